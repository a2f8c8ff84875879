"""bench/grading.py: it measures what it says, on verdicts that are right."""

from __future__ import annotations

from bench import grading
from reason_rl.answers.math import grade_math


def test_the_forms_are_right_but_for_the_last_of_each() -> None:
    for forms in (grading.COMMON, grading.SYMBOLIC):
        statuses = [grade_math(request).status for request in grading.requests(forms, len(forms))]
        assert statuses == ["right"] * (len(forms) - 1) + ["wrong"]


def test_rates_are_of_every_kind_that_is_named() -> None:
    rates = grading.our_rates(count=50, rounds=1)
    assert rates.keys() == {"common", "symbolic", "text and format"} and all(value > 0 for value in rates.values())
