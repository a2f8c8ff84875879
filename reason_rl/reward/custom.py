"""Rewards of your own: Python functions named in the config as "module:function".

    def brief(problem, text): ...                           # -> a number
    def short(text, num_tokens, max_tokens, finish_reason): ...

A function takes any of the arguments in `ARGUMENTS`; each is passed by its name. It runs in a verifier
worker: if it raises, returns no finite number, passes its deadline or crashes, its completion is ungraded and
the run continues. A judge is the same with a longer deadline and more workers, for functions that ask another
model and mostly wait. Modules are found as Python finds them, in the current folder too.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from reason_rl.answers.verdict import Verdict, graded

ARGUMENTS = {
    "problem": "the `Problem`: its prompt, answer, facts, task, level",
    "text": "the completion's text without its end token, preceded by the prompt's completion_prefix",
    "num_tokens": "the completion's length, end token included",
    "max_tokens": "sampling.max_tokens",
    "finish_reason": '"stop", or "length" if the completion was cut',
}


class CustomRewardError(ValueError):
    """A custom reward cannot be found or called; the message names the config's key."""


def grade_custom(request: Mapping[str, Any], entry_point: str, key: str) -> Verdict:
    """request: a value for each name in `ARGUMENTS`."""
    function, names = load_reward(entry_point, key)
    return graded(function(**{name: request[name] for name in names}))


@lru_cache
def load_reward(entry_point: str, key: str = "reward.custom") -> tuple[Callable[..., float], tuple[str, ...]]:
    """(the function, the arguments it takes). Raises CustomRewardError, or an error of your module."""
    # Import the module. "" is the current folder: torchrun puts only the script's folder on the path.
    module_name, colon, function_name = entry_point.partition(":")
    if not (module_name and colon and function_name):
        raise CustomRewardError(f"{key} must be 'module:function', got {entry_point!r}")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise CustomRewardError(f"{key} = {entry_point!r}: importing {module_name!r} failed: {error}") from error

    # Find the function and check its arguments.
    function = getattr(module, function_name, None)
    if not callable(function):
        raise CustomRewardError(f"{key} = {entry_point!r}: module {module_name!r} has no function {function_name!r}")
    parameters = inspect.signature(function).parameters.values()
    unknown = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
               and (p.name not in ARGUMENTS or p.kind == p.POSITIONAL_ONLY)]
    if unknown:
        raise CustomRewardError(f"{key} = {entry_point!r}: a reward takes any of {', '.join(ARGUMENTS)} by name, "
                                f"got {', '.join(unknown)}")
    takes_all = any(p.kind == p.VAR_KEYWORD for p in parameters)
    return function, tuple(ARGUMENTS) if takes_all else tuple(p.name for p in parameters if p.name in ARGUMENTS)
