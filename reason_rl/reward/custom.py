"""Rewards of the user's own: Python functions named in the config as "module:function".

    def my_reward(problem: Problem, text: str) -> float: ...

They run in a verifier's worker: one that raises, returns no finite number, hangs past its deadline or crashes leaves its
completion ungraded, and the run goes on. A judge is the same with a longer deadline and more workers, for functions that ask
another model and mostly wait. Modules are looked for as Python does, the folder the run was started in included.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from reason_rl.answers.verdict import Verdict, graded
from reason_rl.records import Problem

Reward = Callable[[Problem, str], float]


def grade_custom(request: Mapping[str, Any], entry_point: str, key: str) -> Verdict:
    """request: "problem" and "text"."""
    return graded(load_reward(entry_point, key)(request["problem"], request["text"]))


@lru_cache
def load_reward(entry_point: str, key: str = "reward.custom") -> Reward:
    """The function, or a ValueError that says what is missing."""
    module_name, colon, function_name = entry_point.partition(":")
    if not (module_name and colon and function_name):
        raise ValueError(f"{key} reads 'module:function', got {entry_point!r}")
    if "" not in sys.path:
        sys.path.insert(0, "")  # torchrun starts a script, whose folder and not the current one is searched
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ValueError(f"{key} = {entry_point!r}: importing {module_name!r} failed: {error}") from error
    reward: Reward | None = getattr(module, function_name, None)
    if not callable(reward):
        raise ValueError(f"{key} = {entry_point!r}: module {module_name!r} has no function {function_name!r}")
    return reward
