"""The tasks, by name: generated ones, your own as "module:Class", and those read from files (files.py)."""

from __future__ import annotations

import importlib
import inspect
import sys

from reason_rl.config import ConfigError, TaskConfig
from reason_rl.data.tasks.base import CorpusTask, Exercise, Task, Work
from reason_rl.data.tasks.countdown import Countdown
from reason_rl.data.tasks.files import FILE_TASKS
from reason_rl.data.tasks.program import Program

TASKS: dict[str, Task] = {"program": Program(), "countdown": Countdown()}
FILE_KEYS = ("path", "heldout_path", "max_prompt_tokens", "pass_rates", "min_pass_rate", "max_pass_rate", "curriculum")
"""Keys of [task] that only file tasks use."""

__all__ = ["FILE_TASKS", "TASKS", "CorpusTask", "Exercise", "Task", "Work", "load_task"]


def load_task(config: TaskConfig) -> Task:
    """The generated task that task.name names; raises ConfigError if another key of [task] is not for it."""
    # Find the task.
    if ":" in config.name:
        task = _import_task(config.name)
    elif config.name in TASKS:
        task = TASKS[config.name]
    else:
        raise ConfigError(f"unknown task.name {config.name!r}; known are {', '.join((*TASKS, *FILE_TASKS))}, and module:Class for "
                          "your own")

    # Check the keys that depend on it.
    for key in FILE_KEYS:
        if getattr(config, key) != getattr(TaskConfig(), key):
            raise ConfigError(f"task {config.name!r} generates its problems; task.{key} is for {', '.join(FILE_TASKS)}")
    for key, level in (("task.min_level", config.min_level), ("task.max_level", config.max_level)):
        if level not in task.levels:
            raise ConfigError(f"{key} must be between {task.levels[0]} and {task.levels[-1]} for task {config.name!r}, got {level}")
    if task.operations and (not config.operations or set(config.operations) - set(task.operations)):
        raise ConfigError(f"task.operations must be some of {task.operations!r} for task {config.name!r}, got "
                          f"{config.operations!r}")
    return task


def _import_task(entry_point: str) -> Task:
    """The task class that "module:Class" names, instantiated. The module may be in the working directory."""
    module_name, _, class_name = entry_point.partition(":")
    if not module_name or not class_name:
        raise ConfigError(f"task.name must be module:Class, got {entry_point!r}")
    if "" not in sys.path:
        sys.path.insert(0, "")  # torchrun puts the script's folder on the path, not the working directory
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the module is the user's code: it may raise anything
        raise ConfigError(f"task.name = {entry_point!r}: importing {module_name!r} failed: {type(error).__name__}: "
                          f"{error}") from error

    found = getattr(module, class_name, None)
    if not (inspect.isclass(found) and issubclass(found, Task)):
        actual = repr(found) if hasattr(module, class_name) else "nothing of that name"
        raise ConfigError(f"task.name = {entry_point!r}: {class_name!r} in module {module_name!r} must be a subclass of "
                          f"reason_rl.data.Task, got {actual}")
    if missing := sorted(found.__abstractmethods__):
        raise ConfigError(f"task.name = {entry_point!r}: {class_name!r} in module {module_name!r} must define {', '.join(missing)}")
    if not isinstance(getattr(found, "levels", None), range) or not found.levels:
        raise ConfigError(f"task.name = {entry_point!r}: {class_name!r} in module {module_name!r} must define levels as a range "
                          f"such as range(1, 10), got {getattr(found, 'levels', None)!r}")
    return found()
