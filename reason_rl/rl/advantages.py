"""Advantages of graded groups, and which completions take part in the update (after reward, before packing).

A completion that was not graded has no reward, so its group's statistics leave it out too. A completion that
was cut at max_tokens has a reward: with rl.drop_truncated it counts in the statistics, but its tokens stay
out of the update (DAPO's overlong filtering, arXiv:2503.14476 section 3.4). Left out: sampling further groups
to replace those without signal (rollout), and the formulas (`kernels/group_advantage`).

Letters: B prompts, G group size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kernels.group_advantage import group_advantage
from reason_rl.config import RLConfig
from reason_rl.records import Group


@dataclass(frozen=True)
class Advantages:
    """Of B groups of G completions, in the order given.

    Rewards [[0, 1], [1, 1]] under rl.advantage="mean" with rl.drop_no_signal:
        advantages   [[-0.5, 0.5], [0.0, 0.0]]
        mask         [[True, True], [False, False]]
        has_signal   [True, False]
    """

    advantages: torch.Tensor
    """f32[B, G], on the policy's device; 0 for a completion that takes no part."""
    mask: torch.Tensor
    """bool[B, G], on the CPU: the completion takes part in the update."""
    has_signal: torch.Tensor
    """bool[B], on the CPU: `has_signal` of each group."""


def has_signal(group: Group) -> bool:
    """Whether two graded rewards of the group differ, compared in f32 as `group_advantage` does."""
    rewards = torch.tensor([score.value for score in group.scores if score.is_graded], dtype=torch.float32)
    return len(rewards) > 1 and bool(rewards.max() > rewards.min())


def compute_advantages(groups: Sequence[Group], rl: RLConfig, device: torch.device) -> Advantages:
    """Advantages of a step's groups by rl.advantage, computed on `device`.

    `groups` must be those of all ranks: "batch_std" reads the whole batch. On a GPU nothing here waits for
    the device: the mask that packing needs on the host is computed from the rewards on the host.
    """
    _check_groups(groups)
    rewards = torch.tensor([[score.value for score in group.scores] for group in groups], dtype=torch.float32)  # [B, G]
    is_graded = torch.tensor([[score.is_graded for score in group.scores] for group in groups])
    is_truncated = torch.tensor([[c.finish_reason == "length" for c in group.completions] for group in groups])
    _check_finite(rewards, is_graded)

    # Who takes part, on the host.
    signal = torch.tensor([has_signal(group) for group in groups])
    mask = is_graded
    if rl.drop_truncated:
        mask = mask & ~is_truncated
    if rl.drop_no_signal:
        mask = mask & signal[:, None]

    # The advantages, on the device.
    advantages, _ = group_advantage(
        rewards.to(device, non_blocking=True), is_graded.to(device, non_blocking=True), kind=rl.advantage)
    return Advantages(advantages.where(mask.to(device, non_blocking=True), 0.0), mask, signal)


def _check_groups(groups: Sequence[Group]) -> None:
    if not groups or not groups[0].completions:
        raise ValueError("compute_advantages: expected at least one group with completions, got none")
    group_size = len(groups[0].completions)
    for index, group in enumerate(groups):
        if len(group.completions) != group_size or len(group.scores) != group_size:
            raise ValueError(f"compute_advantages: every group must have G = {group_size} completions and scores, "
                             f"group {index} has {len(group.completions)} and {len(group.scores)}")


def _check_finite(rewards: torch.Tensor, is_graded: torch.Tensor) -> None:
    """Checked on the host: on a GPU the op does not, as that would wait for the device."""
    for index, completion in (is_graded & ~rewards.isfinite()).nonzero().tolist():
        raise ValueError(f"compute_advantages: graded rewards must be finite, got {rewards[index, completion].item()} "
                         f"for completion {completion} of group {index}")
