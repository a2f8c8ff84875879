"""The path from rewards to the loss has no device sync. Fake CUDA tensors test it without a GPU: they have no
values, so that a read raises."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from kernels.group_advantage import AdvantageKind, group_advantage
from kernels.grpo_loss import LossInputs, LossSpec
from kernels.linear_grpo_loss import linear_grpo_loss
from kernels.triton_ops import unsupported_reason

pytestmark = pytest.mark.skipif(bool(unsupported_reason(torch.device("cuda"))), reason="needs triton")


def test_reading_a_value_of_a_fake_tensor_raises() -> None:
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        bool(torch.empty(3, device="cuda").isfinite().all())


@pytest.mark.parametrize("kind", ["std", "batch_std"])
@pytest.mark.parametrize("has_mask", [True, False])
def test_advantages_stay_on_the_device_and_nothing_waits_for_it(kind: AdvantageKind, has_mask: bool) -> None:
    with FakeTensorMode():
        rewards, mask = torch.empty(4, 8, device="cuda"), torch.empty(4, 8, dtype=torch.bool, device="cuda")
        advantages, has_signal = group_advantage(rewards, mask if has_mask else None, kind)
    assert advantages.is_cuda and advantages.dtype == torch.float32 and advantages.shape == (4, 8)
    assert has_signal.is_cuda and has_signal.dtype == torch.bool and has_signal.shape == (4,)


@pytest.mark.parametrize("spec", [LossSpec(), LossSpec(ratio="sequence", normalizer="sequence")])
def test_the_loss_takes_them_by_index_select_without_a_sync(spec: LossSpec) -> None:
    with FakeTensorMode(), torch.no_grad():  # autograd's nodes need a real device
        advantages, _ = group_advantage(torch.empty(4, 8, device="cuda"))
        index, old_logprobs = torch.empty(100, dtype=torch.int64, device="cuda"), torch.empty(100, device="cuda")
        inputs = LossInputs(
            old_logprobs=old_logprobs, advantages=advantages.flatten().index_select(0, index), sequence_index=index,
            num_sequences=32, total_loss_tokens=100, total_sequences=32)
        hidden, weight = torch.empty(100, 16, device="cuda"), torch.empty(50, 16, device="cuda")
        loss, metrics, logprobs = linear_grpo_loss(hidden, weight, index, inputs, spec)
    assert loss.is_cuda and logprobs.shape == (100,) and all(value.is_cuda for value in metrics.values())
