"""bench/grading.py: its cases get the right verdicts, and it measures every kind that it names."""

from __future__ import annotations

from bench import grading
from reason_rl.answers.math import grade_math


def test_all_answers_are_right_but_the_last_of_each_list() -> None:
    for pairs in (grading.COMMON, grading.SYMBOLIC):
        statuses = [grade_math(request).status for request in grading.requests(pairs, len(pairs))]
        assert statuses == ["right"] * (len(pairs) - 1) + ["wrong"]


def test_the_disputed_answers_are_wrong_here() -> None:
    assert {grade_math({"text": f"\\boxed{{{given}}}", "answer": answer}).status for answer, given in grading.DISPUTED} == {"wrong"}


def test_every_named_kind_has_a_rate() -> None:
    rates = grading.our_rates(count=50, rounds=1)
    assert rates.keys() == {"common", "symbolic", "text and format"} and all(value > 0 for value in rates.values())
