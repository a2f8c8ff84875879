"""bench/learning.py: each broken promise is named, and a missing figure breaks its promise."""

from __future__ import annotations

from typing import Any

import pytest

from bench.learning import PROMISES, shown, unkept

PROMISE = PROMISES["program"]
ENDS = [{"problems": 500, "samples": 4}, {"problems": 100, "samples": 4}, {"problems": 500, "samples": 4}]
KEPT: dict[str, Any] = {
    "base_accuracy": 0.2, "final_accuracy": 0.95, "base_mean_thinking_tokens": 3.0, "final_mean_thinking_tokens": 29.0,
    "final_format_rate": 0.99, "max_abs_logprob_gap": 0.0, "wall_s": 200.0, "curve": ENDS}


def test_a_run_that_reaches_its_limits_keeps_every_promise():
    assert unkept(KEPT, PROMISE) == []  # evaluations between the ends may have fewer problems
    assert unkept(KEPT | {"max_abs_logprob_gap": 1e-4, "final_accuracy": PROMISE.least_final_accuracy}, PROMISE) == []


@pytest.mark.parametrize(("change", "words"), [
    ({"max_abs_logprob_gap": 2e-4}, "logprob gap 0.0002 > 0.0001"), ({"base_accuracy": 0.5}, "base accuracy"),
    ({"final_accuracy": 0.5}, "final accuracy"), ({"final_mean_thinking_tokens": 4.0}, "growth of thinking"),
    ({"final_format_rate": 0.5}, "format"), ({"wall_s": 1e4}, "seconds"),
    ({"curve": [ENDS[0], ENDS[1]]}, "held-out problems 100 < 500"),
    ({"curve": [{"problems": 500, "samples": 2}, ENDS[2]]}, "samples of each 2 < 4"),
])
def test_each_broken_promise_is_named_alone(change: dict[str, Any], words: str):
    (failure,) = unkept(KEPT | change, PROMISE)
    assert failure.startswith(words)


@pytest.mark.parametrize("key", sorted(set(KEPT) - {"curve"}))
def test_a_missing_figure_breaks_its_promise(key: str):
    (failure,) = unkept(KEPT | {key: None}, PROMISE)
    assert "(none)" in failure and shown(None) == "(none)"
