"""A user's task class for tests, named in a config as "module:Class"."""

from __future__ import annotations

import random

from reason_rl.data import Exercise, Task
from reason_rl.data.tasks.program import Program


class Double(Task):
    levels = range(1, 5)

    def draw(self, rng: random.Random, level: int, operations: str) -> Exercise:
        number = rng.randrange(10**level)
        return Exercise(prompt=f"{number}+{number}=", level=level, answer=str(2 * number), key=str(number))


class Broken(Program):
    """A task with a bug: its ValueError is not about the config."""

    def draw(self, rng: random.Random, level: int, operations: str) -> Exercise:
        raise ValueError("invalid literal in the user's own code")
