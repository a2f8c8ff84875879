"""`group_answers`: groups the sampled answers of one problem by equality, for a majority vote (cons@k).

A kind of the verifier service; an evaluation submits one request per problem. Two answers are equal if each
would be right with the other as the right answer: by value for math, as text for text and countdown.

Left out: programs. Two programs agree if they compute the same function, and nothing here compares that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reason_rl.answers.extract import extract_answer, find_answer
from reason_rl.answers.math import grade_answer
from reason_rl.answers.verdict import Verdict

COMPARED = ("text", "countdown", "math")
"""The verifiers whose answers can be compared."""


def answer_of(text: str, verifier: str) -> str | None:
    """The answer in a completion by its verifier's rule; None without an answer, and for programs."""
    if verifier not in COMPARED:
        return None
    return (find_answer(text) if verifier == "math" else extract_answer(text)) or None


def group_answers(request: Mapping[str, Any]) -> Verdict:
    """request: "answers", "verifier" -> parts: by each answer's index, the index of the first answer equal to
    it.

    Answers ["5", "6", "5.0"] and verifier "math" give the parts {"0": 0, "1": 1, "2": 0}.
    """
    is_same = same_value if request["verifier"] == "math" else str.__eq__
    founders: list[tuple[str, int]] = []
    groups: dict[str, int] = {}

    # Compare each distinct text with the first answer of every group.
    for index, answer in enumerate(request["answers"]):
        if answer not in groups:
            groups[answer] = next((first for founder, first in founders if is_same(founder, answer)), index)
            if groups[answer] == index:
                founders.append((answer, index))
    parts = {str(index): groups[answer] for index, answer in enumerate(request["answers"])}
    return Verdict("right", value=float(len(founders)), parts=parts)


def same_value(a: str, b: str) -> bool:
    """Grades both ways: 48+24 has the value of 72, but it is a wrong answer if 72 is the right one."""
    return grade_answer(a, b).status == "right" and grade_answer(b, a).status == "right"
