"""group_advantage: how much better than its group each completion did (step 4: rewards in, advantages out).

Siblings: `kernels/group_advantage/reference.py` (the specification), `triton_kernel.py` beside it,
`tests/kernels/test_group_advantage.py`.
Left out: who takes part in the update (`reason_rl/rl/advantages.py`), and anything per token.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch

from kernels import triton_ops
from kernels.checks import check
from kernels.dispatch import Implementation, Op
from kernels.group_advantage.reference import group_advantage_reference, make_inputs

__all__ = ["OP", "AdvantageKind", "group_advantage", "make_inputs"]

AdvantageKind = Literal["std", "mean", "leave_one_out", "batch_std"]
FLOATS = (torch.float32, torch.float64)

triton_ops.register("group_advantage", {
    "group_advantage": "(Tensor(a!) advantages, Tensor(b!) has_signal, Tensor rewards, Tensor mask, str kind, float eps) -> ()"})


def group_advantage_triton(rewards: torch.Tensor, mask: torch.Tensor, kind: str, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    advantages = torch.empty_like(rewards, memory_format=torch.contiguous_format)
    has_signal = torch.empty(mask.shape[0], dtype=torch.bool, device=mask.device)
    triton_ops.OPS.group_advantage(advantages, has_signal, rewards.contiguous(), mask.contiguous(), kind, eps)
    return advantages, has_signal


OP = Op("group_advantage", (
    Implementation("triton", group_advantage_triton, triton_ops.why_not, FLOATS),
    Implementation("reference", group_advantage_reference)))


def group_advantage(
    rewards: torch.Tensor,
    mask: torch.Tensor | None = None,
    kind: AdvantageKind = "std",
    eps: float = 1e-6,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantage of each completion over its group, and which groups say anything at all.

    Over the n unmasked rewards r of a group:

        std             A = (r - mean) / (std + eps)         GRPO, arXiv:2402.03300 section 4.1.2
        mean            A =  r - mean                        Dr. GRPO, arXiv:2503.20783 section 3.2
        leave_one_out   A =  r - mean of the other n - 1     RLOO, arXiv:2402.14740
        batch_std       A = (r - mean) / (std over all unmasked rewards of the batch + eps)

    std is the sample standard deviation (divides by n - 1): the GRPO paper names no divisor, and TRL and verl both take
    `torch.std`'s default. The whole batch must stand in `rewards` for "batch_std", those of other ranks too.

    Arguments: rewards f32|f64[B, G], mask bool[B, G] (True takes part; None: all do), eps > 0.
    Returns: advantages like rewards, and has_signal bool[B]. A group has signal when it has two unmasked rewards that
    differ, found exactly (max != min, no tolerance); elsewhere, and at masked members, advantages are exactly 0.
    Raises ValueError on shapes, dtypes, and a NaN or infinite reward among the unmasked.
    Not differentiable: rewards are data. Statistics are taken in f64 and stored in the dtype of rewards.
    Moved: 4 B G bytes of rewards and B G of mask in, 4 B G + B out.
    """
    check("group_advantage", "rewards", rewards, ("B", "G"), FLOATS)
    if rewards.shape[1] == 0:
        raise ValueError("group_advantage: rewards must have G >= 1 members in a group, got G = 0")
    if mask is None:
        mask = torch.ones_like(rewards, dtype=torch.bool)
    check("group_advantage", "mask", mask, tuple(rewards.shape), torch.bool, like=rewards)
    if kind not in get_args(AdvantageKind):
        raise ValueError(f"group_advantage: kind must be one of {list(get_args(AdvantageKind))}, got {kind!r}")
    if not eps > 0:
        raise ValueError(f"group_advantage: eps must be above 0, got {eps}")
    is_bad = mask & ~rewards.isfinite()
    if bool(is_bad.any()):
        group, member = is_bad.nonzero()[0].tolist()
        raise ValueError(f"group_advantage: unmasked rewards must be finite, got {rewards[group, member].item()} "
                         f"at rewards[{group}, {member}]")
    advantages, has_signal = OP.choose(rewards, impl).run(rewards.detach(), mask, kind, eps)
    return advantages, has_signal
