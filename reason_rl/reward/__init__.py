"""Rewards: a completion and its `Problem` give a `Score`.

Third stage of a step, in parallel with the second: a completion is graded as soon as it is sampled.

    grade.py     `Grader`: submits a completion to the verifiers it needs, and sums their verdicts by weight
    parts.py     format, the overlong penalty, and answers compared as text
    code.py      programs, run against tests in reason_rl/sandbox
    custom.py    your own function, or a judge
    model.py     a reward model
    pool/        the worker processes that all of these run in

docs/rewards.md describes how each verdict is reached. Workers import this package and must start without
torch, so the names below are imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reason_rl.reward.grade import Grader, Pending, check_rewards

__all__ = ["Grader", "Pending", "check_rewards"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from reason_rl.reward import grade
    return getattr(grade, name)
