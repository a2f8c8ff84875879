"""group_advantage: how much better each completion did than its group (step 4: rewards in, advantages out).

Siblings: `kernels/group_advantage/reference.py` (the specification), `triton_kernel.py` there,
`tests/kernels/test_group_advantage.py`. Left out: which completions take part in the update
(`reason_rl/rl/advantages.py`), and advantages per token (see `group_advantage`).
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
KINDS = get_args(AdvantageKind)
FLOATS = (torch.float32, torch.float64)

triton_ops.register("group_advantage", {
    "group_advantage": "(Tensor(a!) advantages, Tensor(b!) has_signal, Tensor rewards, Tensor? mask, str kind, float eps) -> ()"})


def group_advantage_triton(
    rewards: torch.Tensor, mask: torch.Tensor | None, kind: str, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    advantages = torch.empty_like(rewards, memory_format=torch.contiguous_format)
    has_signal = torch.empty(rewards.shape[0], dtype=torch.bool, device=rewards.device)
    mask = None if mask is None else mask.contiguous()
    triton_ops.OPS.group_advantage(advantages, has_signal, rewards.contiguous(), mask, kind, eps)
    return advantages, has_signal


OP = Op("group_advantage", (
    Implementation("triton", group_advantage_triton, triton_ops.unsupported_reason, FLOATS),
    Implementation("reference", group_advantage_reference)))


def group_advantage(
    rewards: torch.Tensor,
    mask: torch.Tensor | None = None,
    kind: AdvantageKind = "std",
    eps: float = 1e-6,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantage of each completion over its group, and which groups have a learning signal.

    Over the n unmasked rewards r of a group:

        std             A = (r - mean) / (std + eps)         GRPO, arXiv:2402.03300 section 4.1.2
        mean            A =  r - mean                        Dr. GRPO, arXiv:2503.20783 section 3.2
        leave_one_out   A =  r - mean of the other n - 1     RLOO, arXiv:2402.14740
        batch_std       A = (r - mean) / (std over all unmasked rewards of the batch + eps)

    std is the sample standard deviation (divides by n - 1): the GRPO paper names no divisor, and TRL and verl
    both use `torch.std`'s default. For "batch_std" `rewards` must hold the whole batch, other ranks' rewards
    included.

    Arguments: rewards f32|f64[B, G], mask bool[B, G] (True takes part; None: all do), eps > 0.
    Returns: advantages like rewards, and has_signal bool[B]. A group has signal if two of its unmasked
    rewards differ, compared exactly (max != min, no tolerance). Without signal, and at masked members,
    advantages are exactly 0.
    Raises ValueError on shapes, dtypes, and, on the CPU, an unmasked reward that is NaN or infinite. On a GPU
    that check would sync. There has_signal of such a group is True and its unmasked advantages are NaN or
    infinite (under "batch_std" those of all groups with signal), and so is the loss.
    Not differentiable: rewards are data. Statistics are computed in f64 and stored in the dtype of rewards.
    Moved: 4 B G bytes of rewards and B G of mask in, 4 B G + B out. On a GPU one launch ("batch_std" two) and
    no device sync.

    The loss takes one advantage per token, and `advantages.flatten().index_select(0, completion_index)` gives
    it on the device; completion_index i64[N] is b * G + g of each loss token's completion. An estimator whose
    advantages differ within a completion (a process reward, GAE) replaces that f32[N]: the loss accepts any
    f32[N] under ratio="token".
    """
    check("group_advantage", "rewards", rewards, ("B", "G"), FLOATS)
    if rewards.shape[1] == 0:
        raise ValueError("group_advantage: rewards must have G >= 1 members in a group, got G = 0")
    if mask is not None:
        check("group_advantage", "mask", mask, tuple(rewards.shape), torch.bool, like=rewards)
    if kind not in KINDS:
        raise ValueError(f"group_advantage: kind must be one of {list(KINDS)}, got {kind!r}")
    if not eps > 0:
        raise ValueError(f"group_advantage: eps must be above 0, got {eps}")
    if rewards.is_cpu:
        _check_finite(rewards, mask)
    advantages, has_signal = OP.choose(rewards, impl).run(rewards.detach(), mask, kind, eps)
    return advantages, has_signal


def _check_finite(rewards: torch.Tensor, mask: torch.Tensor | None) -> None:
    is_bad = ~rewards.isfinite() if mask is None else mask & ~rewards.isfinite()
    if bool(is_bad.any()):
        group, member = is_bad.nonzero()[0].tolist()
        raise ValueError(f"group_advantage: unmasked rewards must be finite, got {rewards[group, member].item()} "
                         f"at rewards[{group}, {member}]")
