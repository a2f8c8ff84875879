"""A reward of the user's own: a Python function named in the config as "module:function".

    def my_reward(problem: Problem, text: str) -> float: ...

Modules are looked for as Python does, the folder the run was started in included.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable

from reason_rl.types import Problem

Reward = Callable[[Problem, str], float]


def load_reward(entry_point: str) -> Reward:
    """The function, or a ValueError that says what is missing."""
    module_name, colon, function_name = entry_point.partition(":")
    if not (module_name and colon and function_name):
        raise ValueError(f"reward.custom reads 'module:function', got {entry_point!r}")
    if "" not in sys.path:
        sys.path.insert(0, "")  # torchrun starts a script, whose folder and not the current one is searched
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ValueError(f"reward.custom = {entry_point!r}: importing {module_name!r} failed: {error}") from error
    reward = getattr(module, function_name, None)
    if not callable(reward):
        raise ValueError(f"reward.custom = {entry_point!r}: module {module_name!r} has no function {function_name!r}")
    return reward
