"""What a task is: a way to draw exercises, to work them out in writing, and to guess wrong.

`data.problems` turns exercises into `Problem`s for RL and evaluation, `data.corpus` into documents for pretraining.
Left out: verification, which is the `reward` room's; an exercise carries in `answer` and `facts` all that it needs.

A worked thought must be learnable by a tiny model: each step is a verbatim lookup of a label plus arithmetic on what
stands at fixed offsets nearby.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar


@dataclass(frozen=True, slots=True)
class Exercise:
    """One problem of a task, before it is encoded."""

    prompt: str
    level: int
    answer: str
    """The right answer, or an example of one."""
    key: str
    """What the split is decided by: equal for exercises that are the same but for the order they are written in."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What a verifier needs beyond `answer`."""


@dataclass(frozen=True, slots=True)
class Work:
    """A worked thought, line by line, and the answer it arrives at."""

    lines: tuple[str, ...]
    answer: str


class Task(ABC):
    """A family of exercises. Subclass it, put an instance into `TASKS`, and name it in `task.name`."""

    name: ClassVar[str]
    levels: ClassVar[range]
    """The levels that `draw` knows."""
    operations: ClassVar[str] = ""
    """The values of `task.operations` it understands; empty when it has operations of its own."""
    separator: ClassVar[str] = ","
    """Between the lines of a thought."""

    @abstractmethod
    def draw(self, rng: random.Random, level: int, operations: str) -> Exercise:
        """One exercise of that level; only `rng` decides."""

    @abstractmethod
    def work(self, exercise: Exercise) -> Work:
        """The worked thought; a function of the exercise alone."""

    @abstractmethod
    def wrong_answer(self, rng: random.Random, exercise: Exercise) -> str:
        """A well-formed answer that is not right."""

    @abstractmethod
    def fact(self, rng: random.Random, operations: str) -> str:
        """One step's arithmetic as a text of its own."""
