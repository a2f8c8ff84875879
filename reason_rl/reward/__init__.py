"""Verifiers: a completion's text and its `Problem` give a `Score`.

Third stage of a step: beside the engine, which hands over completions as they finish, and before advantages are taken.

    grade.py                  `Grader`: which kinds a completion goes to, and the weighted sum of what they say (in the trainer)
    service.py, process.py    the worker pool, seen from the trainer          verdict.py  what a verifier says
    worker.py                 the pool, seen from inside a worker
    text.py                   all that is quick: format, overlong, cosine, language, repetition, tasks compared as text
    math/, code/              answers compared by value; programs run against tests
    votes.py                  which of a problem's sampled answers are the same
    custom.py                 your own function, and a judge
    gold.py                   which verifier a task's answers go to, and whether it can read them

docs/rewards.md says how each verdict is reached. Workers import this package too: nothing heavy is imported before it is
asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reason_rl.reward.grade import Grader, Pending, check_rewards

__all__ = ["Grader", "Pending", "check_rewards"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.grade"), name)
