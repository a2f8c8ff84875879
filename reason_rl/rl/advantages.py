"""From scored groups to advantages, and to who takes part in the update (step 4, between reward and packing).

A completion that was not graded has no reward, so it takes no part in its group's statistics either. One that was cut
at max_tokens has a reward: with rl.drop_truncated it still counts in the statistics, but its tokens stay out of the
update (DAPO's overlong filtering, arXiv:2503.14476 section 3.4). Left out: refilling groups without signal (the step
does it, as it needs the engine), and the formulas (`kernels/group_advantage`).

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
    """Of B groups of G completions, in the order given; all on the CPU."""

    advantages: torch.Tensor
    """f32[B, G]; 0 where the completion takes no part."""
    mask: torch.Tensor
    """bool[B, G]: the completion takes part in the update."""
    has_signal: torch.Tensor
    """bool[B]: the group's graded rewards differ."""


def has_signal(group: Group) -> bool:
    """Whether two graded rewards of the group differ, compared in f32 as `group_advantage` does."""
    rewards = torch.tensor([score.value for score in group.scores if score.is_graded], dtype=torch.float32)
    return len(rewards) > 1 and bool(rewards.max() > rewards.min())


def compute_advantages(groups: Sequence[Group], rl: RLConfig) -> Advantages:
    """Advantages of all groups of a step (of all ranks: "batch_std" reads the whole batch), by rl.advantage."""
    _check_groups(groups)
    rewards = torch.tensor([[score.value for score in group.scores] for group in groups], dtype=torch.float32)  # [B, G]
    is_graded = torch.tensor([[score.is_graded for score in group.scores] for group in groups])
    is_truncated = torch.tensor([[c.finish_reason == "length" for c in group.completions] for group in groups])

    advantages, has_signal = group_advantage(rewards, is_graded, kind=rl.advantage)
    mask = is_graded
    if rl.drop_truncated:
        mask = mask & ~is_truncated
    if rl.drop_no_signal:
        mask = mask & has_signal[:, None]
    return Advantages(advantages.where(mask, 0.0), mask, has_signal)


def _check_groups(groups: Sequence[Group]) -> None:
    if not groups or not groups[0].completions:
        raise ValueError("compute_advantages: expected at least one group with completions, got none")
    group_size = len(groups[0].completions)
    for index, group in enumerate(groups):
        if len(group.completions) != group_size or len(group.scores) != group_size:
            raise ValueError(f"compute_advantages: every group must have G = {group_size} completions and scores, "
                             f"group {index} has {len(group.completions)} and {len(group.scores)}")
