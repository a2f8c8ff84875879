"""group_advantage in plain torch: the specification of every other implementation.

The op in `kernels/group_advantage/__init__.py` calls it after its contract checks; `make_inputs` gives the
named cases of its tests and benches. Left out: the checks.
"""

from __future__ import annotations

import torch


def group_advantage_reference(
    rewards: torch.Tensor, mask: torch.Tensor | None, kind: str, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """rewards f32|f64[B, G], mask bool[B, G] -> (advantages like rewards, has_signal bool[B])

    B prompts, G completions per prompt. mask: True for a completion that was graded; None: all were.
    """
    # Statistics of each group, in f64.
    if mask is None:
        mask = torch.ones_like(rewards, dtype=torch.bool)
    r = rewards.double().where(mask, 0.0)  # `where`, not a product: a masked reward may be NaN
    n = mask.sum(1, keepdim=True).double()  # [B, 1]; two integers would divide in f32
    highest = r.masked_fill(~mask, -torch.inf).amax(1)
    lowest = r.masked_fill(~mask, torch.inf).amin(1)
    total = r.sum(1, keepdim=True)
    # [B]; false where n is 0 (-inf > inf) or 1. A group with a NaN or infinite reward has signal, so that its
    # NaN is not hidden.
    has_signal = (highest > lowest) | ~total.squeeze(1).isfinite()

    # The advantage of each kind.
    mean = total / n.clamp(min=1)
    centered = (r - mean).where(mask, 0.0)
    if kind == "std":
        advantages = centered / (_sample_std(centered.square().sum(1, keepdim=True), n) + eps)
    elif kind == "mean":
        advantages = centered
    elif kind == "leave_one_out":
        # r - (n * mean - r) / (n - 1) = (r - mean) * n / (n - 1)
        advantages = centered * (n / (n - 1).clamp(min=1))
    else:  # batch_std
        num_unmasked = mask.sum()
        batch_mean = r.sum() / num_unmasked.clamp(min=1)
        squares = (r - batch_mean).where(mask, 0.0).square().sum()
        advantages = centered / (_sample_std(squares, num_unmasked) + eps)
    # The rounded mean of equal rewards may differ from them, and a small eps would magnify that: zero is set
    # exactly.
    advantages = advantages.where(has_signal[:, None], 0.0)
    return advantages.to(rewards.dtype), has_signal


def _sample_std(sum_of_squares: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
    return (sum_of_squares / (n - 1).clamp(min=1)).sqrt()


def make_inputs(device: str | torch.device = "cpu") -> dict[str, dict[str, torch.Tensor]]:
    """Name -> keyword arguments `rewards`, `mask` of `group_advantage`."""

    def case(name: str, num_prompts: int, group_size: int, kept: float, levels: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(sum(name.encode()))
        shape = (num_prompts, group_size)
        rewards = torch.randint(0, levels, shape, generator=generator) * 0.1
        if levels > 100:
            rewards = torch.randn(shape, generator=generator)
        mask = torch.rand(shape, generator=generator) < kept
        return {"rewards": rewards.float().to(device), "mask": mask.to(device)}

    return {
        "right_or_wrong": case("right_or_wrong", 16, 16, kept=1.0, levels=2),
        "graded_in_part": case("graded_in_part", 32, 8, kept=0.6, levels=3),
        "odd_group": case("odd_group", 7, 13, kept=0.9, levels=1000),
        "pairs": case("pairs", 64, 2, kept=0.7, levels=2),
        "lone_members": case("lone_members", 9, 1, kept=0.5, levels=1000),
        "large": case("large", 4096, 64, kept=0.95, levels=1000),
    }
