"""`group_answers`: which of a problem's sampled answers are the same answer? What a majority vote (cons@k) is counted from.

A kind of the verifier service, asked once a problem by an evaluation. Two answers are the same where each would be right if the
other were the right one: by value where the verifier is math, as text where it is text or countdown.

Left out: programs. Two of them agree where they do the same, and nothing here compares that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reason_rl.answers.math import grade_answer
from reason_rl.answers.math.extract import find_answer
from reason_rl.answers.verdict import Verdict
from reason_rl.reward.accuracy import extract_answer

COMPARED = ("text", "countdown", "math")
"""The verifiers whose answers are compared."""


def answer_of(text: str, verifier: str) -> str | None:
    """A completion's answer, as its verifier finds it; None where there is none, and for programs."""
    if verifier not in COMPARED:
        return None
    return (find_answer(text) if verifier == "math" else extract_answer(text)) or None


def group_answers(request: Mapping[str, Any]) -> Verdict:
    """request: "answers", "verifier" -> parts: for each answer's place ("0", "1", ...) the place of the first that is the same."""
    is_same = same_value if request["verifier"] == "math" else str.__eq__
    founders: list[tuple[str, int]] = []
    groups: dict[str, int] = {}
    for place, answer in enumerate(request["answers"]):
        if answer not in groups:
            groups[answer] = next((first for founder, first in founders if is_same(founder, answer)), place)
            if groups[answer] == place:
                founders.append((answer, place))
    parts = {str(place): groups[answer] for place, answer in enumerate(request["answers"])}
    return Verdict("right", value=float(len(founders)), parts=parts)


def same_value(a: str, b: str) -> bool:
    """Both ways: 48+24 has the value of 72, but is no answer where 72 is the right one."""
    return grade_answer(a, b).status == "right" and grade_answer(b, a).status == "right"
