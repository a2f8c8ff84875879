"""The terminal view: which one is picked, what it says, and that it can neither end a run nor hold up Ctrl-C."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from reason_rl.report.terminal import (
    LiveView,
    PlainView,
    View,
    count,
    duration,
    make_view,
    sparkline,
    split_completion,
)

RL = {"reward": 1.05, "accuracy": 0.95, "thinking_tokens": 29.3, "length": 37.1, "kl": 0.01, "approx_kl": 0.002, "entropy": 0.08,
      "max_abs_logprob_gap": 0.0, "thinks_share": 1.0}
RATES = {"rollout_s": 0.3, "rollout_tok_s": 32100.0, "train_tok_s": 30500.0}


@pytest.fixture(autouse=True)
def ordinary_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "CI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def console(terminal: bool, width: int = 100) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, height=50, color_system="256")


def written(view: Any) -> str:
    return str(view.console.file.getvalue())


def run_through(view: View) -> None:
    with view:
        view.phase("pretrain", 4, detail="0.01 M tokens")
        for step in range(1, 5):
            view.update(step, {"loss": 2.0 / step, "lr": 1e-3}, {"train_tok_s": 29000.0})
        view.phase("rl", 2)
        view.update(0, {"split": "heldout", "accuracy": 0.165, "mean_thinking_tokens": 2.9}, phase="eval")
        view.update(1, RL, RATES)
        view.sample("a2,b*3?", "<think>a2,b*3=6</think><answer>6</answer>", 1.1, is_right=True)
        view.update(2, RL, RATES)
        view.update(2, {"split": "heldout", "accuracy": 0.96, "mean_thinking_tokens": 29.0}, phase="eval")
        view.message("saved [bold]here[/bold]")


def test_a_pipe_gets_plain_lines_with_every_number_and_no_escape_codes() -> None:
    view = make_view("program, seed 0", console=console(terminal=False))
    assert isinstance(view, PlainView)
    run_through(view)
    text = written(view)
    assert "\x1b" not in text
    for words in ("program, seed 0", "pretrain  4/4  loss 0.5000", "rl        1/2  reward 1.050  right 95.0%",
                  "thinking 29.3", "KL 0.01", "KL to old policy 0.002",
                  "entropy 0.080", "logprob gap 0.0e+00", "rollout 32.1k tok/s",
                  "held-out accuracy 96.0%", "a2,b*3?", "thought: a2,b*3=6  answer: 6  reward 1.10 right",
                  "saved [bold]here[/bold]"):
        assert words in text, words


def test_a_terminal_gets_the_live_view_with_curve_and_sample() -> None:
    view = make_view("program, seed 0", console=console(terminal=True))
    assert isinstance(view, LiveView)
    run_through(view)
    text = written(view)
    for words in ("held-out", "96.0%", "29.3", "▁", "16.5% → 96.0%", "a2,b*3=6", "✓ right", "32.1k", "\x1b[?25h"):
        assert words in text, words  # the last one: the cursor is given back


@pytest.mark.parametrize("terminal", [True, False])
def test_ungraded_completions_are_spoken_of_only_where_there_are_any(terminal: bool) -> None:
    for number in (0, 3):
        with make_view("t", console=console(terminal)) as view:
            view.phase("rl", 3)
            view.update(1, RL | {"ungraded": number})
        assert ("ungraded" in written(view)) == (number > 0)


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_the_live_view_draws_at_any_width(width: int) -> None:
    view = LiveView("t", console(terminal=True, width=width))
    run_through(view)
    assert "2/2" in written(view)


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("CI", "true"), ("TERM", "dumb")])
def test_the_environment_can_ask_for_plain_lines(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    assert isinstance(make_view("t", console=console(terminal=True)), PlainView)


def test_other_ranks_are_silent() -> None:
    screen = console(terminal=True)
    view = make_view("t", rank=1, console=screen)
    run_through(view)
    assert screen.file.getvalue() == ""  # type: ignore[attr-defined]


@pytest.mark.parametrize("terminal", [True, False])
def test_nothing_that_a_step_hands_over_can_raise(terminal: bool) -> None:
    with make_view("t", console=console(terminal)) as view:
        view.update(1, RL)  # before any phase
        view.phase("rl", 0)
        view.update(1, {"reward": None, "accuracy": float("nan"), "kl": "?"}, {"rollout_tok_s": None})
        view.update(1, {"accuracy": None}, phase="eval")
        view.update("x", None)  # type: ignore[arg-type]
        view.sample(None, None, None)  # type: ignore[arg-type]
        view.message(None)  # type: ignore[arg-type]
        view.phase("rl", 3)
        view.update(1, RL, RATES)


@pytest.mark.parametrize("terminal", [True, False])
def test_ctrl_c_passes_through_an_update(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    view = make_view("t", console=console(terminal))
    with pytest.raises(KeyboardInterrupt), view:
        view.phase("rl", 3)
        monkeypatch.setattr(view, "_changed", interrupt)
        view.update(1, RL)


@pytest.mark.parametrize("terminal", [True, False])
def test_escape_sequences_of_a_completion_do_not_reach_the_terminal(terminal: bool) -> None:
    with make_view("t", console=console(terminal)) as view:
        view.phase("rl", 3)
        view.update(1, RL)
        view.sample("p\x1b]0;owned\x07", "<think>\x1b[2J\x9b31m[red]</think><answer>[/red]\r7</answer>", 0.0)
        view.message("\x1b[2Jgone")
    text = written(view)
    assert "\x1b]0;" not in text and "\x1b[2J" not in text and "\x9b" not in text and "\x07" not in text
    assert "[red]" in text and "[/red]" in text  # rich markup is shown, not obeyed


@pytest.mark.parametrize(("text", "thought", "answer"), [
    ("<think>a=1</think><answer>7</answer>", "a=1", "7"),
    ("<think></think><answer>7</answer>", "", "7"),
    ("<think>cut off", "cut off", ""),
    ("just 7", "", "just 7"),
    ("<think>x</think>no tags", "x", "no tags"),
])
def test_a_completion_splits_into_thought_and_answer(text: str, thought: str, answer: str) -> None:
    assert split_completion("p", text) == ("p", thought, answer)


def test_numbers_read_as_people_write_them() -> None:
    assert [duration(s) for s in (0.4, 59.6, 75, 3720)] == ["0s", "1m00s", "1m15s", "1h02m"]
    assert [count(v) for v in (12, 32100.0, 2.5e6)] == ["12", "32.1k", "2.5M"]
    assert sparkline([0.0, 0.5, 1.0, 2.0], top=1.0, width=3) == "▅██"


def test_time_left_follows_the_pace_since_a_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("reason_rl.report.terminal.time.monotonic", lambda: now[0])
    view = View("t")
    view.phase("rl", 90, start=80)
    assert view.time_left_s() is None
    now[0] += 8.0
    view.update(84, RL)
    assert view.time_left_s() == pytest.approx(12.0)  # 2 s a step, 6 to go; exact up to rounding
