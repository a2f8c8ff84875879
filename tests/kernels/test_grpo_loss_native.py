"""The native grpo_loss: its bits with several threads, and the argument checks below the public op."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels.grpo_loss import LossSpec, make_inputs
from kernels.grpo_loss.function import METRICS
from kernels.native import ISA, OPS
from tests.kernels.compare import THREADS, same_bits
from tests.kernels.loss_cases import PER_TOKEN, loss_of

pytestmark = pytest.mark.skipif(not ISA, reason="needs the native library")


def test_the_same_bits_with_one_thread_and_with_two() -> None:
    inputs, spec = make_inputs()["step"], LossSpec(ratio="sequence", kl_coef=0.1, entropy_coef=0.1, importance="icepop")
    runs = []
    for threads in THREADS:
        torch.set_num_threads(threads)
        leaves = {name: inputs[name].clone().requires_grad_() for name in ("logprobs", "entropy")}
        loss, metrics = loss_of({**inputs, **leaves}, spec, "native")
        runs.append([loss.detach(), *torch.autograd.grad(loss, list(leaves.values())), *metrics.values()])
    assert all(same_bits(a, b) for a, b in zip(*runs, strict=True))


def arguments(**changes: Any) -> list[Any]:
    inputs = make_inputs()["uneven"]
    n = len(inputs["logprobs"])
    named = {
        "loss": torch.full((), torch.nan), "metrics": torch.full((len(METRICS),), torch.nan),
        "dlogprobs": torch.full((n,), torch.nan), "dentropy": torch.full((n,), torch.nan),
        **{name: inputs[name] for name in ("logprobs", "old_logprobs", "advantages", "sequence_index", *PER_TOKEN[3:])},
        "choices": [0, 0, 2, 0, 0], "counts": [6, n, 6, 0], "numbers": [0.2, 0.2, 0.0, 0.1, 0.5, 2.0, 0.1]}
    assert set(changes) <= set(named)
    return list({**named, **changes}.values())


def test_the_op_writes_every_element() -> None:
    filled = arguments()
    OPS.grpo_loss(*filled)
    assert all(tensor.isfinite().all() for tensor in filled[:4])


@pytest.mark.parametrize(("name", "value"), [
    ("loss", torch.zeros(1)), ("metrics", torch.zeros(3)), ("dlogprobs", torch.zeros(3)), ("dentropy", torch.zeros(0)),
    ("logprobs", torch.zeros(34, 1)), ("old_logprobs", torch.zeros(34).double()), ("advantages", torch.zeros(33)),
    ("rollout_logprobs", torch.zeros(68)[::2]), ("ref_logprobs", None), ("entropy", None), ("sequence_index", torch.zeros(34)),
    ("sequence_index", torch.zeros(33, dtype=torch.int64)), ("sequence_index", torch.full((34,), 6)),
    ("sequence_index", torch.full((34,), -1)), ("sequence_index", torch.arange(34).flip(0) // 6),
    ("choices", [0, 0, 2, 0]), ("choices", [2, 0, 2, 0, 0]), ("choices", [0, 3, 2, 0, 0]), ("choices", [0, 0, 2, 0, -1]),
    ("choices", [0, 0, 2, 0, 2]), ("counts", [6, 34, 5, 0]), ("counts", [-1, 34, 6, 0]), ("numbers", [0.2])])  # fmt: skip
def test_bad_arguments_to_the_op_are_named(name: str, value: Any) -> None:
    words = "counts must" if value == [0, 0, 2, 0, 2] else name + ".* must"  # divided by a constant length of 0
    with pytest.raises(RuntimeError, match=f"grpo_loss: .*{words}"):
        OPS.grpo_loss(*arguments(**{name: value}))
