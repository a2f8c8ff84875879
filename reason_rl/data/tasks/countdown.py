"""Countdown: reach a target with all of the numbers, each used exactly once. The level is how many numbers
there are, 3 or 4.

    prompt   a3b9c8=48?
    thought  a3+b9=12:+c8=20/48<-c8=4/48<*c8=96/48>b9-a3=6:+c8=14/48<c8-=2/48<*c8=48/48!
    answer   (9-3)*8

The thought is a search in a fixed order. Each line combines a pair of numbers; after the colon it combines
the result with the remaining number in every allowed way. Each candidate repeats the target and compares to
it (< > !), so a step depends on nothing far away except one label. Subtraction takes the smaller value from
the larger: `c8-=2` means c8 minus the pair's value (8 - 6).
Values over 99 and fractions are skipped.

With 4 numbers, a first move combines two of them under a new label, and the search continues with the three
terms that remain:

    prompt   a7b2c6d6=3?
    thought  c6-b2=e4.a7+d6=13:+e4=17/3>-e4=9/3>*e4=52/3>a7-d6=1:+e4=5/3>e4-=3/3!
    answer   (6-2)-(7-6)

At most one first move fails before one that reaches the target, so that a thought stays within
MAX_TRACE_CHARACTERS.
Every problem has a solution, because its target is the value of an expression. Targets that a few random
guesses hit are dropped.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from reason_rl.data.tasks.base import CorpusTask, Exercise, Work

LARGEST_NUMBER, LARGEST_VALUE = 9, 99
MAX_TRACE_CHARACTERS = 640
"""Limit for a thought with two first moves. With 3 numbers, a thought has up to 330 characters with + - *,
and 480 with / too."""
NUM_GUESSES = 4
LABELS = "abcdefgh"


@dataclass(frozen=True, slots=True)
class Term:
    """A given number, or the result of combining two terms (`is_made`)."""

    value: int
    expression: str
    label: str = ""
    is_made: bool = False

    def __str__(self) -> str:
        """As written in a thought: label and value."""
        return f"{self.label}{self.value}"

    def operand(self) -> str:
        return f"({self.expression})" if self.is_made else self.expression


class Countdown(CorpusTask):
    levels: ClassVar[range] = range(3, 5)
    operations: ClassVar[str] = "+-*/"
    separator: ClassVar[str] = ""

    def draw(self, rng: random.Random, level: int, operations: str) -> Exercise:
        num_dropped = 0
        while True:
            numbers = [1 + int(rng.random() * LARGEST_NUMBER) for _ in range(level)]
            made = random_expression(rng, numbers, operations)
            if made is None or made.value < 1:
                continue
            # With few operations all problems may be easy (sums have one value), so drop at most 50.
            if num_dropped == 50 or not _is_easy(rng, numbers, made.value, operations):
                break
            num_dropped += 1
        prompt = "".join(f"{label}{n}" for label, n in zip(LABELS, numbers)) + f"={made.value}?"
        return Exercise(prompt=prompt, level=level, answer=made.expression,
                        key=f"{sorted(numbers)}={made.value}",
                        facts={"numbers": numbers, "target": made.value, "operations": operations})

    def work(self, exercise: Exercise) -> Work:
        target, operations = exercise.facts["target"], exercise.facts["operations"]
        terms = [Term(n, str(n), label) for label, n in zip(LABELS, exercise.facts["numbers"])]
        if len(terms) == 3:
            lines, answer = search_three(terms, target, operations)
        else:
            lines, answer = _search_four(terms, target, operations, random.Random(exercise.prompt))
        assert answer is not None, f"{exercise.prompt} has a solution that the search does not find"
        return Work(lines=tuple(lines), answer=answer)

    def wrong_answer(self, rng: random.Random, exercise: Exercise) -> str:
        """An expression that uses the numbers once each and misses the target."""
        operations = exercise.facts["operations"]
        for attempt in range(1000):
            # With few operations all expressions may be right (sums have one value), so widen them.
            made = random_expression(rng, exercise.facts["numbers"], operations if attempt < 20 else "+-*")
            if made is not None and made.value != exercise.facts["target"]:
                return made.expression
        raise ValueError(f"found no wrong answer to {exercise.prompt} in 1000 attempts")

    def fact(self, rng: random.Random, operations: str) -> str:
        while True:
            made = Term(rng.randint(0, LARGEST_VALUE), "", is_made=True)
            last = Term(rng.randint(1, LARGEST_NUMBER), "", rng.choice(LABELS[:3]))
            text = _way_on(made, last, rng.choice(operations), rng.randint(1, LARGEST_VALUE))
            if text is not None:
                return f"{made.value}:{text}"


def combine(x: Term, y: Term, operation: str, label: str = "") -> Term | None:
    """Combines x and y, the larger first for - and /; None if the value is over 99 or not an integer."""
    if operation in "-/" and y.value > x.value:
        x, y = y, x
    match operation:
        case "+":
            value = x.value + y.value
        case "-":
            value = x.value - y.value
        case "*":
            value = x.value * y.value
        case _:
            if y.value == 0 or x.value % y.value:
                return None
            value = x.value // y.value
    if value > LARGEST_VALUE:
        return None
    return Term(value, f"{x.operand()}{operation}{y.operand()}", label, is_made=True)


def random_expression(rng: random.Random, numbers: Sequence[int], operations: str) -> Term | None:
    """Combines the numbers in random pairs and operations; None if a pair cannot be combined."""
    terms = [Term(n, str(n)) for n in numbers]
    while len(terms) > 1:
        x = terms.pop(int(rng.random() * len(terms)))
        y = terms.pop(int(rng.random() * len(terms)))
        if y.is_made and not x.is_made:
            x, y = y, x
        made = combine(x, y, operations[int(rng.random() * len(operations))])
        if made is None:
            return None
        terms.append(made)
    return terms[0]


def _is_easy(rng: random.Random, numbers: Sequence[int], target: int, operations: str) -> bool:
    """Whether one of a few random guesses hits the target, so that guessing would be rewarded."""
    guesses = (random_expression(rng, numbers, operations) for _ in range(NUM_GUESSES))
    return any(guess is not None and guess.value == target for guess in guesses)


def search_three(terms: Sequence[Term], target: int, operations: str) -> tuple[list[str], str | None]:
    """-> (lines of the search up to the first hit, the expression that hits), or (all lines, None)."""
    lines: list[str] = []
    for i, j, k in ((0, 1, 2), (0, 2, 1), (1, 2, 0)):
        for operation in operations:
            # Combine a pair.
            made = combine(terms[i], terms[j], operation)
            if made is None:
                continue
            x, y = _in_order(terms[i], terms[j], operation)
            line = f"{x}{operation}{y}={made.value}:"

            # Combine the result with the third term in each way, and stop at the first hit.
            for last_operation in operations:
                line += _way_on(made, terms[k], last_operation, target) or ""
                if line.endswith("!"):
                    hit = combine(made, terms[k], last_operation)
                    assert hit is not None
                    return [*lines, line], hit.expression
            lines.append(line)
    return lines, None


def _way_on(made: Term, last: Term, operation: str, target: int) -> str | None:
    """`*c8=48/48!` from a pair with value 6, `c8-=2/48<` if the last is larger; None if not allowed."""
    final = combine(made, last, operation)
    if final is None:
        return None
    first, _ = _in_order(made, last, operation)
    move = f"{operation}{last}" if first is made else f"{last}{operation}"
    sign = "!" if final.value == target else "<" if final.value < target else ">"
    return f"{move}={final.value}/{target}{sign}"


def _in_order(x: Term, y: Term, operation: str) -> tuple[Term, Term]:
    return (y, x) if operation in "-/" and y.value > x.value else (x, y)


def _search_four(terms: Sequence[Term], target: int, operations: str,
                 rng: random.Random) -> tuple[list[str], str | None]:
    """First moves in random order: at most one that fails, if there is room, then one that succeeds."""
    failed: list[str] = []
    for move in _shuffled_moves(len(terms), operations, rng):
        lines, answer = _after_move(terms, move, LABELS[len(terms) + bool(failed)], target, operations)
        if answer is None:
            failed = failed or lines
        elif sum(map(len, [*failed, *lines])) <= MAX_TRACE_CHARACTERS:
            return [*failed, *lines], answer
        else:
            return _after_move(terms, move, LABELS[len(terms)], target, operations)
    return failed, None


def _after_move(terms: Sequence[Term], move: tuple[int, int, str], label: str, target: int,
                operations: str) -> tuple[list[str], str | None]:
    """The lines of a first move and of the search that follows; none if the move is not allowed."""
    i, j, operation = move
    made = combine(terms[i], terms[j], operation, label)
    if made is None:
        return [], None
    x, y = _in_order(terms[i], terms[j], operation)
    rest = [term for n, term in enumerate(terms) if n not in (i, j)]
    lines, answer = search_three([*rest, made], target, operations)
    return [f"{x}{operation}{y}={made}.", *lines], answer


def _shuffled_moves(num_terms: int, operations: str, rng: random.Random) -> list[tuple[int, int, str]]:
    moves = [(i, j, operation) for i in range(num_terms) for j in range(i + 1, num_terms) for operation in operations]
    rng.shuffle(moves)
    return moves
