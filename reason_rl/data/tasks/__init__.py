"""The tasks by name. A task of your own: subclass `Task` (base.py) and add an instance here."""

from __future__ import annotations

from reason_rl.data.tasks.arithmetic import Arithmetic
from reason_rl.data.tasks.base import Exercise, Task, Work
from reason_rl.data.tasks.countdown import Countdown
from reason_rl.data.tasks.program import Program

TASKS: dict[str, Task] = {task.name: task for task in (Program(), Arithmetic(), Countdown())}

__all__ = ["TASKS", "Exercise", "Task", "Work"]
