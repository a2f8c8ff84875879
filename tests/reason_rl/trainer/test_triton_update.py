"""An update and a rollout of a whole model on the Triton kernels: each op's implementation, and equality with the
CPU's results.

Without a GPU they run in Triton's interpreter, in a process that tests/kernels/test_interpreted.py starts.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels.dispatch import Implementation, Op
from kernels.triton_ops import IS_INTERPRETED
from reason_rl.parallel.world import World
from tests.reason_rl.tiny import (
    CPU,
    MOE,
    different_bits,
    hand_made_group,
    make_engine,
    packed,
    problem,
    sampling,
    tiny_model,
    trainer_logprobs,
)
from tests.reason_rl.trainer.test_update import assert_same, policy_gradients

DEVICE = CPU if IS_INTERPRETED else torch.device("cuda")
pytestmark = [] if IS_INTERPRETED else [pytest.mark.gpu]
CONFIG = replace(MOE, num_hidden_layers=1, num_shared_experts=1)
MODEL_OPS = {"linear", "rms_norm", "add_rms_norm", "rope", "moe_route", "moe_experts", "swiglu"}
UPDATE_OPS = MODEL_OPS | {"attention", "linear_grpo_loss"}
ROLLOUT_OPS = MODEL_OPS | {"attention", "paged_attention", "sample"}  # prefill and decode


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The ops that ran and their implementation, chosen as on a GPU, without native kernels."""
    picked: dict[str, str] = {}

    def choose(self: Op, like: torch.Tensor, impl: str = "auto", variant: str = "") -> Implementation:
        able = [i for i in self.implementations if i.is_automatic and i.name != "native" and not i.refusal(like.device, like.dtype)]
        chosen = able[0] if impl == "auto" else self.resolve(like.device, like.dtype, impl, variant)
        picked[self.name] = chosen.name
        return chosen

    monkeypatch.setattr(Op, "choose", choose)
    return picked


def assert_on_kernels(ran: dict[str, str], ops: set[str]) -> None:
    assert set(ran) == ops
    assert set(ran.values()) == {"triton"}


def test_an_update_runs_on_kernels_and_its_gradients_are_those_of_the_cpus(
    ran: dict[str, str], monkeypatch: pytest.MonkeyPatch
):
    packs, world = packed([hand_made_group(0, 4, [5, 1, 9])], 10**6), World(0, 1, DEVICE, torch.float32)
    gradients, metrics = policy_gradients(tiny_model(CONFIG).to(DEVICE), packs, world=world)
    assert_on_kernels(ran, UPDATE_OPS)
    monkeypatch.undo()
    expected, want = policy_gradients(tiny_model(CONFIG), packs)
    # 2e-5 of the largest: f32 sums of about a hundred terms in another order, through a whole model.
    assert_same(expected, {name: gradient.cpu() for name, gradient in gradients.items()}, 2e-5)
    assert metrics == pytest.approx(want, rel=1e-4, abs=1e-6)


def test_a_rollout_runs_on_kernels_and_its_logprobs_are_the_trainers(ran: dict[str, str]):
    model = tiny_model(CONFIG).to(DEVICE)
    groups = make_engine(model, decoder="ops").generate([problem(0, 5), problem(1, 3)], 2, sampling(max_tokens=4), step=0)
    assert_on_kernels(ran, ROLLOUT_OPS)
    (pack,) = packed(groups, 10**6)
    assert pack.rollout_logprobs is not None
    assert different_bits(pack.rollout_logprobs, trainer_logprobs(model, [pack.to(DEVICE)]).cpu()) == 0
