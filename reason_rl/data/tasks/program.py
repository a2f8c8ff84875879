"""The default task: a calculator program with labelled lines, on digits, mod 10.

    prompt   a2,b*3,c-1,d-8?        start with 2, times 3, minus 1, minus 8
    thought  a2,b*3=6,c-1=5,d-8=7   each line looks up the next label and applies its step to the last digit
    answer   7

The level is the number of lines. The multipliers 3, 7 and 9 are invertible mod 10, so all ten answers are
equally likely and a guess is right one time in ten.
"""

from __future__ import annotations

import random
import string
from typing import ClassVar

from reason_rl.data.tasks.base import CorpusTask, Exercise, Work

STEPS = (*(f"+{d}" for d in range(1, 10)), *(f"-{d}" for d in range(1, 10)), "*3", "*7", "*9")
STEPS_BY_OPERATION = (STEPS[:9], STEPS[9:18], STEPS[18:])


def apply_step(value: int, step: str) -> int:
    """`apply_step(2, "*3") == 6`, mod 10."""
    operand = int(step[1:])
    match step[0]:
        case "+":
            return (value + operand) % 10
        case "-":
            return (value - operand) % 10
        case _:
            return value * operand % 10


class Program(CorpusTask):
    levels: ClassVar[range] = range(1, 27)

    def draw(self, rng: random.Random, level: int, operations: str) -> Exercise:
        value = int(rng.random() * 10)
        lines = [f"a{value}"]
        for label in string.ascii_lowercase[1:level]:
            step = _draw_step(rng)
            value = apply_step(value, step)
            lines.append(label + step)
        prompt = ",".join(lines) + "?"
        return Exercise(prompt=prompt, level=level, answer=str(value), key=prompt)

    def work(self, exercise: Exercise) -> Work:
        first, *rest = exercise.prompt[:-1].split(",")
        value = int(first[1:])
        lines = [first]
        for line in rest:
            value = apply_step(value, line[1:])
            lines.append(f"{line}={value}")
        return Work(lines=tuple(lines), answer=str(value))

    def wrong_answer(self, rng: random.Random, exercise: Exercise) -> str:
        return str((int(exercise.answer) + 1 + int(rng.random() * 9)) % 10)

    def fact(self, rng: random.Random, operations: str) -> str:
        value, step = int(rng.random() * 10), _draw_step(rng)
        return f"{value}{step}={apply_step(value, step)}"


def _draw_step(rng: random.Random) -> str:
    """Each of the three operations with the same probability."""
    steps = STEPS_BY_OPERATION[int(rng.random() * 3)]
    return steps[int(rng.random() * len(steps))]
