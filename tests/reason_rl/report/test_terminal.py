"""The terminal view: which one is chosen, its output, and that it neither ends a run nor swallows Ctrl-C."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from reason_rl.report.terminal import LiveView, PlainView, View, make_view
from reason_rl.report.text import count, duration, sparkline, split_completion

GRPO = {"reward": 1.05, "accuracy": 0.95, "thinking_tokens": 29.3, "length": 37.1, "kl": 0.01, "approx_kl": 0.002, "entropy": 0.08,
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
        view.recipe(("pretrain", "grpo"))
        view.stage("pretrain", "pretrain", 4)
        for step in range(1, 5):
            view.train(step, {"loss": 2.0 / step, "lr": 1e-3}, {"train_tok_s": 29000.0})
        view.stage("grpo", "grpo", 2)
        view.evaluation(0, {"split": "heldout", "accuracy": 0.165, "mean_thinking_tokens": 2.9}, {"eval_s": 75.0})
        view.train(1, GRPO, RATES)
        view.sample("a2,b*3?", "<think>a2,b*3=6</think><answer>6</answer>", 1.1, is_right=True)
        view.train(2, GRPO, RATES)
        view.evaluation(2, {"split": "heldout", "accuracy": 0.96, "mean_thinking_tokens": 29.0})
        view.message("saved [bold]here[/bold]")


def test_a_pipe_gets_plain_lines_with_every_number_and_no_escape_codes() -> None:
    view = make_view("program, seed 0", console=console(terminal=False))
    assert isinstance(view, PlainView)
    run_through(view)
    text = written(view)
    assert "\x1b" not in text
    for words in ("program, seed 0", "stage 1 of 2: pretrain, 4 steps", "pretrain  4/4  loss 0.5000",
                  "stage 2 of 2: grpo, 2 steps", "grpo      1/2  reward 1.050  right 95.0%",
                  "thinking 29.3", "KL 0.01", "KL to old policy 0.002",
                  "entropy 0.080", "logprob gap 0.0e+00", "rollout 32.1k tok/s",
                  "eval      step 0  held-out accuracy 16.5%  thinking 2.9  in 1m15s",
                  "held-out accuracy 96.0%", "a2,b*3?", "thought: a2,b*3=6  answer: 6  reward 1.10 right",
                  "saved [bold]here[/bold]"):
        assert words in text, words


def test_a_terminal_gets_the_live_view_with_curve_and_sample() -> None:
    view = make_view("program, seed 0", console=console(terminal=True))
    assert isinstance(view, LiveView)
    run_through(view)
    text = written(view)
    for words in ("stage 2 of 2: grpo", "held-out", "96.0%", "29.3", "▁",
                  "16.5% → 96.0%", "a2,b*3=6", "✓ right", "32.1k", "\x1b[?25h"):
        assert words in text, words  # the last one shows the cursor again


@pytest.mark.parametrize("terminal", [True, False])
def test_ungraded_completions_are_shown_only_if_there_are_any(terminal: bool) -> None:
    for number in (0, 3):
        with make_view("t", console=console(terminal)) as view:
            view.stage("grpo", "grpo", 3)
            view.train(1, GRPO | {"ungraded": number})
        assert ("ungraded" in written(view)) == (number > 0)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_stage_of_any_kind_shows_the_columns_it_logs(terminal: bool) -> None:
    with make_view("t", console=console(terminal, width=200)) as view:
        view.stage("student", "distill", 3)
        view.train(1, {"loss": 0.5, "teacher_kl": 0.25, "a": 1, "b": 2, "c": 3, "d": 4, "note": "text"})
        view.evaluation(1, {"loss": 0.75, "agreement": 0.5})
    text = written(view)
    words = ("student", "loss", "0.5000", "teacher kl", "0.25") if terminal else (
        "student, 3 steps", "student   1/3  loss 0.5000  teacher kl 0.25  a 1  b 2  c 3",
        "eval      step 1  loss 0.75  agreement 0.5")
    assert all(word in text for word in words) and "  d 4" not in text and "stage 1" not in text


def test_a_new_stage_starts_with_empty_curves() -> None:
    view = LiveView("t", console(terminal=True))
    run_through(view)
    view.stage("grpo-2", "grpo", 5)
    assert view.heldout == [] and view.latest == {} and view.time_left_s() is None


@pytest.mark.parametrize(("kind", "total", "stride", "shown"), [
    ("pretrain", 600, 10, [10, *range(30, 601, 30)]), ("grpo", 80, 1, [*range(1, 81)]),
    ("grpo", 2000, 1, [1, *range(20, 2001, 20)]),
    ("sft", 100, 1, [1, *range(2, 101, 2)]),
])
def test_a_log_shows_every_nth_step_and_both_ends(kind: str, total: int, stride: int, shown: list[int]) -> None:
    with make_view("t", console=console(terminal=False)) as view:
        view.stage("s", kind, total)
        for step in range(stride, total + 1, stride):
            view.train(step, {"loss": 1.0})
    steps = [int(line.split()[1].split("/")[0]) for line in written(view).splitlines() if f"/{total} " in line]
    assert steps == shown


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
def test_no_value_of_a_step_makes_the_view_raise(terminal: bool) -> None:
    with make_view("t", console=console(terminal)) as view:
        view.train(1, GRPO)  # before any stage
        view.stage("grpo", "grpo", 0)
        view.train(1, {"reward": None, "accuracy": float("nan"), "kl": "?"}, {"rollout_tok_s": None})
        view.evaluation(1, {"accuracy": None})
        view.train("x", None)  # type: ignore[arg-type]
        view.sample(None, None, None)  # type: ignore[arg-type]
        view.message(None)  # type: ignore[arg-type]
        view.stage("grpo", "grpo", 3)
        view.train(1, GRPO, RATES)


@pytest.mark.parametrize("terminal", [True, False])
def test_ctrl_c_passes_through_a_step(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    view = make_view("t", console=console(terminal))
    with pytest.raises(KeyboardInterrupt), view:
        view.stage("grpo", "grpo", 3)
        monkeypatch.setattr(view, "_show_step", interrupt)
        view.train(1, GRPO)


@pytest.mark.parametrize("terminal", [True, False])
def test_escape_sequences_of_a_completion_do_not_reach_the_terminal(terminal: bool) -> None:
    with make_view("t", console=console(terminal)) as view:
        view.stage("grpo", "grpo", 3)
        view.train(1, GRPO)
        view.sample("p\x1b]0;owned\x07", "<think>\x1b[2J\x9b31m[red]</think><answer>[/red]\r7</answer>", 0.0)
        view.message("\x1b[2Jgone")
    text = written(view)
    assert "\x1b]0;" not in text and "\x1b[2J" not in text and "\x9b" not in text and "\x07" not in text
    assert "[red]" in text and "[/red]" in text  # rich markup is text


@pytest.mark.parametrize(("text", "thought", "answer"), [
    ("<think>a=1</think><answer>7</answer>", "a=1", "7"),
    ("<think></think><answer>7</answer>", "", "7"),
    ("<think>cut off", "cut off", ""),
    ("just 7", "", "just 7"),
    ("<think>x</think>no tags", "x", "no tags"),
])
def test_a_completion_splits_into_thought_and_answer(text: str, thought: str, answer: str) -> None:
    assert split_completion("p", text) == ("p", thought, answer)


def test_numbers_are_short() -> None:
    assert [duration(s) for s in (0.4, 59.6, 75, 3720)] == ["0s", "1m00s", "1m15s", "1h02m"]
    assert [count(v) for v in (12, 32100.0, 2.5e6)] == ["12", "32.1k", "2.5M"]
    assert sparkline([0.0, 0.5, 1.0, 2.0], top=1.0, width=3) == "▅██"


def test_time_left_follows_the_pace_since_a_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("reason_rl.report.terminal.time.monotonic", lambda: now[0])
    view = View("t")
    view.stage("grpo", "grpo", 90, 80)
    assert view.time_left_s() is None
    now[0] += 8.0
    view.train(84, GRPO)
    assert view.time_left_s() == pytest.approx(12.0)  # 2 s a step, 6 steps left
