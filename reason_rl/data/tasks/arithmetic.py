"""Long sums, differences and products, digit by digit. Level is the number of digits.

Each digit carries a label, so that a column is looked up by labels in order, from the units on:

    prompt   b7a4+o8n5?               74 + 85
    thought  a4+n5+0=09,b7+o8+0=15    digits and carry -> next carry and digit of the result
    answer   159

    prompt   b8a4-o7n5?               84 - 75; the carried digit is a borrow: 4 - 5 - 0 = -10 + 9
    thought  a4-n5-0=19,b8-o7-1=00
    answer   9

    prompt   b7a4*n5?                 74 * 5: products have one digit on the right
    thought  a4*n5+0=20,b7*n5+2=37
    answer   370

What a column carries stands at a fixed place in the line before.
"""

from __future__ import annotations

import random
import re
import string
from typing import ClassVar

from reason_rl.data.tasks.base import Exercise, Task, Work

LEFT_LABELS, RIGHT_LABELS = string.ascii_lowercase[:13], string.ascii_lowercase[13:]
PROMPT = re.compile(r"((?:[a-m][0-9])+)([-+*])((?:[n-z][0-9])+)\?")


class Arithmetic(Task):
    name: ClassVar[str] = "arithmetic"
    levels: ClassVar[range] = range(1, 14)
    operations: ClassVar[str] = "+-*"

    def draw(self, rng: random.Random, level: int, operations: str) -> Exercise:
        operation = rng.choice(operations)
        left = _number(rng, level)
        right = rng.randint(0, 9) if operation == "*" else _number(rng, level)
        if operation == "-" and right > left:
            left, right = right, left
        value = {"+": left + right, "-": left - right, "*": left * right}[operation]
        prompt = f"{_labelled(left, LEFT_LABELS)}{operation}{_labelled(right, RIGHT_LABELS)}?"
        # a + b and b + a are one problem to the split
        low, high = sorted((left, right)) if operation == "+" else (left, right)
        return Exercise(prompt=prompt, level=level, answer=str(value), key=f"{low}{operation}{high}")

    def work(self, exercise: Exercise) -> Work:
        left, operation, right = parse_prompt(exercise.prompt)
        lines, digits, carry = [], "", 0
        for column, (label, digit) in enumerate(left):
            other_label, other = right[0] if operation == "*" else right[column]
            line, carry, result = _column(label, digit, operation, other_label, other, carry)
            lines.append(line)
            digits = f"{result}{digits}"
        return Work(lines=tuple(lines), answer=str(int(f"{carry}{digits}")))

    def wrong_answer(self, rng: random.Random, exercise: Exercise) -> str:
        """Another number of as many digits."""
        length = len(exercise.answer)
        while True:
            guess = str(_number(rng, length))
            if guess != exercise.answer:
                return guess

    def fact(self, rng: random.Random, operations: str) -> str:
        operation = rng.choice(operations)
        carry = rng.randint(0, 8 if operation == "*" else 1)
        return _column("", rng.randint(0, 9), operation, "", rng.randint(0, 9), carry)[0]


def parse_prompt(prompt: str) -> tuple[list[tuple[str, int]], str, list[tuple[str, int]]]:
    """(label, digit) pairs of the left number from the units on, the operation, those of the right number."""
    match = PROMPT.fullmatch(prompt)
    if match is None:
        raise ValueError(f"an arithmetic prompt reads like 'b7a4+o8n5?', got {prompt!r}")
    left, operation, right = match.groups()
    return _pairs(left), operation, _pairs(right)


def _pairs(labelled: str) -> list[tuple[str, int]]:
    return [(labelled[i], int(labelled[i + 1])) for i in range(len(labelled) - 2, -1, -2)]


def _number(rng: random.Random, num_digits: int) -> int:
    return rng.randint(10 ** (num_digits - 1) if num_digits > 1 else 0, 10**num_digits - 1)


def _labelled(number: int, labels: str) -> str:
    """`_labelled(74, "abc") == "b7a4"`: the units are labelled first."""
    digits = str(number)
    return "".join(label + digit for label, digit in zip(reversed(labels[:len(digits)]), digits))


def _column(label: str, digit: int, operation: str, other_label: str, other: int,
            carry: int) -> tuple[str, int, int]:
    """One line of the thought, the carry it hands on, and its digit of the result."""
    match operation:
        case "+":
            carried, result = divmod(digit + other + carry, 10)
        case "-":
            difference = digit - other - carry
            carried, result = int(difference < 0), difference % 10
        case _:
            carried, result = divmod(digit * other + carry, 10)
    sign = "-" if operation == "-" else "+"
    return f"{label}{digit}{operation}{other_label}{other}{sign}{carry}={carried}{result}", carried, result
