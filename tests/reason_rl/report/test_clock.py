"""`Clock` on a fake time that the test advances."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from reason_rl.report.clock import Clock


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    yield now


def test_seconds_of_a_name_add_up(now: list[float]) -> None:
    clock = Clock()
    for seconds in (1.0, 2.0):
        with clock("rollout"):
            now[0] += seconds
        now[0] += 50.0
    assert clock.seconds == {"rollout": 3.0}


def test_a_nested_block_counts_for_both_names(now: list[float]) -> None:
    clock = Clock()
    with clock("step"):
        now[0] += 1.0
        with clock("reward"):
            now[0] += 2.0
    assert clock.seconds == {"step": 3.0, "reward": 2.0}


def test_a_name_nested_in_itself_is_counted_once(now: list[float]) -> None:
    clock = Clock()
    with clock("step"), clock("step"):
        now[0] += 1.0
    assert clock.seconds == {"step": 1.0}


def test_a_block_that_raises_is_counted_and_can_run_again(now: list[float]) -> None:
    clock = Clock()
    with pytest.raises(KeyError), clock("step"):
        now[0] += 1.0
        raise KeyError
    with clock("step"):
        now[0] += 4.0
    assert clock.seconds == {"step": 5.0}
