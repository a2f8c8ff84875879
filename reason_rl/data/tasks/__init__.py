"""The tasks by name. One of your own: subclass `Task` (base.py) and add an instance here; those that stand in files: files.py."""

from __future__ import annotations

from reason_rl.data.tasks.arithmetic import Arithmetic
from reason_rl.data.tasks.base import Exercise, Task, Work
from reason_rl.data.tasks.countdown import Countdown
from reason_rl.data.tasks.files import FILE_TASKS
from reason_rl.data.tasks.program import Program

TASKS: dict[str, Task] = {task.name: task for task in (Program(), Arithmetic(), Countdown())}

__all__ = ["FILE_TASKS", "TASKS", "Exercise", "Task", "Work"]
