"""`Task` generates exercises. `CorpusTask` also writes the documents that a base model is pretrained on.

generated.py turns exercises into `Problem`s for training and evaluation, corpus.py into documents.
Left out: grading. The reward room grades by an exercise's `answer` and `facts` alone.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar


@dataclass(frozen=True, slots=True)
class Exercise:
    """A problem before a template is applied and it is encoded.

    `Exercise(prompt="a3b9c8=48?", level=3, answer="(9-3)*8", key="[3, 8, 9]=48", facts={"target": 48, ...})`
    """

    prompt: str
    level: int
    answer: str
    """The right answer, or an example of one."""
    key: str
    """Its hash decides the split. Exercises that differ only in their order of writing need equal keys."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What a verifier needs beyond `answer`."""


@dataclass(frozen=True, slots=True)
class Work:
    """A worked thought, line by line, and the answer it reaches."""

    lines: tuple[str, ...]
    answer: str


class Task(ABC):
    """A family of exercises. task.name = "module:Class" names a subclass: no arguments, no state."""

    levels: ClassVar[range]
    """The levels that `draw` accepts."""
    operations: ClassVar[str] = ""
    """The characters that task.operations may hold; "" if the task does not use it."""

    @abstractmethod
    def draw(self, rng: random.Random, level: int, operations: str) -> Exercise:
        """One exercise of that level, a function of `rng` and the arguments alone."""


class CorpusTask(Task):
    """A task that a base model can be pretrained on.

    A worked thought must be learnable by a tiny model: each step looks up a label in the prompt, then
    computes on text at fixed offsets nearby.
    """

    separator: ClassVar[str] = ","
    """Between the lines of a thought."""

    @abstractmethod
    def work(self, exercise: Exercise) -> Work:
        """The worked thought, a function of the exercise alone."""

    @abstractmethod
    def wrong_answer(self, rng: random.Random, exercise: Exercise) -> str:
        """A well-formed answer that is not right."""

    @abstractmethod
    def fact(self, rng: random.Random, operations: str) -> str:
        """A document that holds the arithmetic of one step."""
