"""The terminal view of a run: a live panel on a terminal, plain lines elsewhere.

The loop hands each step's metrics and timings to the view, as it logs them. Errors while drawing are
swallowed, so that a view can never end a run; Ctrl-C is not an `Exception` and passes through. `make_view`
chooses: a silent view on every rank but 0, `LiveView` (rich) on a terminal, `PlainView` for pipes, CI,
NO_COLOR and TERM=dumb. Left out: detailed curves (page.py).
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from reason_rl.report.text import count, duration, printable, shorten, sparkline, split_completion

Method = TypeVar("Method", bound=Callable[..., None])
Columns = tuple[tuple[str, str, str], ...]
"""(metric, its word on the screen, its format)"""
SAMPLE_EVERY_S = 5.0
"""A live sample stays on the screen at least this long, so that it can be read."""
PLAIN_LINES = {"pretrain": 20, "grpo": 100}
"""About how many step lines a stage of this kind prints."""
DEFAULT_PLAIN_LINES = 50
OPTIMIZER: Columns = (("loss", "loss", ".4f"), ("lr", "lr", ".1e"), ("grad_norm", "grad norm", ".2f"))
SAMPLING: Columns = (
    ("reward", "reward", ".3f"), ("accuracy", "right", ".1%"), ("format_rate", "format", ".1%"),
    ("thinking_tokens", "thinking", ".1f"), ("length", "length", ".1f"), ("thinks_share", "thinks", ".0%"),
    ("kl", "KL", ".2g"), ("approx_kl", "KL to old policy", ".2g"),
    ("entropy", "entropy", ".3f"), ("max_abs_logprob_gap", "logprob gap", ".1e"),
    ("groups_without_signal", "no signal", ".0%"),
)
COLUMNS: dict[str, Columns] = {
    "pretrain": OPTIMIZER,
    "grpo": (*SAMPLING, *OPTIMIZER, ("ungraded", "ungraded", ".0f")),
}
"""By kind of stage. Other kinds show the grpo columns that they log, then up to MAX_OTHERS other metrics."""
MAX_OTHERS = 4
EVAL_COLUMNS: Columns = (
    ("accuracy", "held-out accuracy", ".1%"), ("mean_thinking_tokens", "thinking", ".1f"), ("thinks_share", "thinks", ".0%"),
    ("accuracy_given_thought", "right given a thought", ".1%"), ("accuracy_given_none", "given none", ".1%"),
    ("format_rate", "format", ".1%"),
)
ONLY_ABOVE_0 = ("ungraded",)


def never_raises(method: Method) -> Method:
    """Swallows every `Exception` of a drawing method; KeyboardInterrupt and SystemExit still rise."""

    @functools.wraps(method)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            method(*args, **kwargs)
        except Exception:
            return

    return guarded  # type: ignore[return-value]


class View:
    """The silent view. It also holds the state that the other two draw."""

    def __init__(self, title: str = "") -> None:
        self.title = title
        self.recipe_stages: tuple[str, ...] = ()
        self.started_s = time.monotonic()
        self._begin("", "", 0, 0)

    def __enter__(self) -> View:
        return self

    def __exit__(self, *exception: object) -> None:
        return None

    @never_raises
    def recipe(self, stages: Sequence[str]) -> None:
        """The names of all stages in order; from now on the view shows a stage's position among them."""
        self.recipe_stages = tuple(stages)

    @never_raises
    def stage(self, name: str, kind: str, num_steps: int, first_step: int = 0) -> None:
        """A stage begins, or continues after `first_step` steps."""
        self._begin(name, kind, num_steps, first_step)
        self._show_stage()

    @never_raises
    def train(self, step: int, metrics: Mapping[str, Any], timings: Mapping[str, Any] | None = None) -> None:
        """An optimizer step's numbers, as logged."""
        self.step = step
        self.latest = _numbers(metrics)
        self.rates = {key: value for key, value in _numbers(timings or {}).items() if key.endswith("_tok_s") and value}
        self._show_step()

    @never_raises
    def evaluation(self, step: int, metrics: Mapping[str, Any], timings: Mapping[str, Any] | None = None) -> None:
        """The numbers of an evaluation after `step` steps, as logged."""
        values = _numbers(metrics)
        for key, points in (("accuracy", self.heldout), ("mean_thinking_tokens", self.thinking)):
            if key in values:
                points.append((step, values[key]))
        self._show_evaluation(step, values, _numbers(timings or {}))

    @never_raises
    def sample(self, prompt: str, text: str, reward: float, is_right: bool | None = None) -> None:
        """A completion; `is_right=None` shows the reward without a verdict."""
        self._show_sample(split_completion(prompt, text), reward, is_right)

    @never_raises
    def message(self, text: str) -> None:
        self._say(printable(text))

    def heading(self) -> str:
        """'stage 2 of 2: grpo'"""
        if self.stage_name not in self.recipe_stages:
            return self.stage_name
        return f"stage {self.recipe_stages.index(self.stage_name) + 1} of {len(self.recipe_stages)}: {self.stage_name}"

    def time_left_s(self) -> float | None:
        """Seconds to the end of the stage at the pace so far; None before its first step."""
        done = self.step - self.first_step
        if done <= 0 or not self.num_steps:
            return None
        return (time.monotonic() - self.stage_started_s) / done * max(0, self.num_steps - self.step)

    def cells(self) -> list[tuple[str, str]]:
        """The latest step's numbers as (word, value)."""
        return _cells(self.latest, COLUMNS.get(self.kind, COLUMNS["grpo"]), 0 if self.kind in COLUMNS else MAX_OTHERS)

    def _begin(self, name: str, kind: str, num_steps: int, first_step: int) -> None:
        self.stage_name, self.kind, self.num_steps = name, kind, num_steps
        self.step = self.first_step = first_step
        self.stage_started_s = time.monotonic()
        self.latest, self.rates = {}, {}
        self.heldout: list[tuple[int, float]] = []
        """(step, accuracy) of the stage's evaluations."""
        self.thinking: list[tuple[int, float]] = []

    def _show_stage(self) -> None:
        return None

    def _show_step(self) -> None:
        return None

    def _show_evaluation(self, step: int, metrics: Mapping[str, float], timings: Mapping[str, float]) -> None:
        return None

    def _show_sample(self, parts: tuple[str, str, str], reward: float, is_right: bool | None) -> None:
        return None

    def _say(self, text: str) -> None:
        return None


class PlainView(View):
    """One line per event, for logs. Steps are thinned out to about `PLAIN_LINES` lines a stage."""

    def __init__(self, title: str, console: Console) -> None:
        super().__init__(title)
        self.console = console
        self.printed_step: int | None = None

    def __enter__(self) -> View:
        self.message(self.title)
        return self

    def _show_stage(self) -> None:
        self.printed_step = None
        self._say(f"{self.heading()}, {self.num_steps - self.first_step} steps"
                  + (f" from step {self.first_step}" if self.first_step else ""))

    def _show_step(self) -> None:
        every = max(1, self.num_steps // PLAIN_LINES.get(self.kind, DEFAULT_PLAIN_LINES))
        is_first = self.printed_step is None
        if not is_first and self.step != self.num_steps and self.step // every == (self.printed_step or 0) // every:
            return
        self.printed_step = self.step
        words = [f"{self.stage_name:<9} {self.step}/{self.num_steps}"]
        words += [f"{word} {value}" for word, value in self.cells()]
        words += [f"{name} {count(rate)} tok/s" for name, rate in rate_words(self.rates)]
        left = self.time_left_s()
        self._say("  ".join(words if left is None else [*words, f"{duration(left)} left"]))

    def _show_evaluation(self, step: int, metrics: Mapping[str, float], timings: Mapping[str, float]) -> None:
        cells = _cells(metrics, EVAL_COLUMNS, 0 if "accuracy" in metrics else MAX_OTHERS)
        self._say("  ".join([f"eval      step {step}", *(f"{word} {value}" for word, value in cells),
                             *([f"in {duration(timings['eval_s'])}"] if "eval_s" in timings else [])]))

    def _show_sample(self, parts: tuple[str, str, str], reward: float, is_right: bool | None) -> None:
        prompt, thought, answer = parts
        verdict = {True: "right", False: "wrong", None: ""}[is_right]
        self._say(f"  sample  {shorten(prompt, 120)}  thought: {shorten(thought, 240) or '(none)'}  "
                  f"answer: {shorten(answer, 60)}  reward {reward:.2f} {verdict}".rstrip())

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


class LiveView(View):
    """One panel, redrawn 4 times a second: progress, latest numbers, the stage's curves, and a sample."""

    def __init__(self, title: str, console: Console) -> None:
        super().__init__(title)
        self.console = console
        self.shown_sample: RenderableType | None = None
        self.sample_since_s = -SAMPLE_EVERY_S
        self.live = Live(self, console=console, refresh_per_second=4)

    def __enter__(self) -> View:
        self.live.start(refresh=True)
        return self

    def __exit__(self, *exception: object) -> None:
        self.live.stop()

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False)

    def _show_sample(self, parts: tuple[str, str, str], reward: float, is_right: bool | None) -> None:
        now = time.monotonic()
        if now - self.sample_since_s < SAMPLE_EVERY_S:
            return
        self.sample_since_s = now
        prompt, thought, answer = parts
        style = {True: "green", False: "red", None: "yellow"}[is_right]
        verdict = {True: "✓ right", False: "✗ wrong", None: "reward"}[is_right]
        body = Text.assemble((shorten(prompt, 300) + "\n", "bold"),
                             (shorten(thought, 600) or "(no thought)", "dim italic"),
                             ("\n→ ", style), (shorten(answer, 120), f"bold {style}"))
        self.shown_sample = Panel(body, title=f"[dim]sample, step {self.step}[/]", title_align="left",
                                  subtitle=f"[{style}]{verdict}, {reward:.2f}[/]", subtitle_align="right",
                                  border_style="dim", box=box.ROUNDED)

    def __rich__(self) -> RenderableType:
        try:
            top = Group(self._header(), self._progress())
            parts = [top, self._latest_numbers(), self._curves(), self.shown_sample]
            return Group(*[Padding(part, (0, 0, 1, 0)) for part in parts if part is not None])
        except Exception:  # rich draws from a thread: a traceback there would garble the screen
            return Text(f"{self.stage_name} {self.step}/{self.num_steps}")

    def _header(self) -> RenderableType:
        elapsed = duration(time.monotonic() - self.started_s)
        return Text.assemble((self.title, "bold cyan"), ("   " + elapsed, "dim"))

    def _progress(self) -> RenderableType:
        name = f"{self.heading():<9}"
        width = max(10, min(46, self.console.width - 37 - len(name)))
        done = min(1.0, self.step / self.num_steps) if self.num_steps else 0.0
        filled = round(done * width)
        left = self.time_left_s()
        return Text.assemble((f"{name}  ", "bold"), ("━" * filled, "cyan"), ("━" * (width - filled), "grey35"),
                             f"  {self.step}/{self.num_steps}", ("" if left is None else f"  {duration(left)} left", "dim"))

    def _latest_numbers(self) -> RenderableType | None:
        """Each word above its value, in as many columns as fit the window."""
        cells = self.cells()
        cells += [(f"{name} tok/s", count(rate)) for name, rate in rate_words(self.rates)]
        if self.heldout:
            cells.insert(0, ("held-out", f"{self.heldout[-1][1]:.1%}"))
        if not cells:
            return None
        num_columns = max(1, min(8, self.console.width // 13))
        table = Table.grid(padding=(0, 2))
        for start in range(0, len(cells), num_columns):
            some = cells[start:start + num_columns]
            table.add_row(*[Text(word, style="dim") for word, _ in some])
            table.add_row(*[Text(value, style="bold green" if word == "held-out" else "bold") for word, value in some])
        return table

    def _curves(self) -> RenderableType | None:
        if len(self.heldout) < 2:
            return None
        table = Table.grid(padding=(0, 2))
        for name, points, top, style in (("held-out accuracy", self.heldout, 1.0, ".1%"),
                                         ("thinking tokens", self.thinking, 0.0, ".1f")):
            if points:
                values = [value for _, value in points]
                table.add_row(Text(name, style="dim"), Text(sparkline(values, top, 32), style="cyan"),
                              f"{values[0]:{style}} → {values[-1]:{style}}")
        return table


def make_view(title: str, rank: int = 0, console: Console | None = None) -> View:
    """The view that fits this output; use it as a context manager."""
    if rank != 0:
        return View(title)
    console = console or Console()
    is_plain = (os.environ.get("NO_COLOR") or os.environ.get("CI") or os.environ.get("TERM") == "dumb"
                or not console.is_terminal)
    return PlainView(title, console) if is_plain else LiveView(title, console)


def rate_words(rates: Mapping[str, float]) -> list[tuple[str, float]]:
    """{"rollout_tok_s": 3e4} -> [("rollout", 3e4)]"""
    return [(key.removesuffix("_tok_s"), rate) for key, rate in rates.items()]


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {key: value for key, value in values.items() if isinstance(value, int | float)}


def _cells(values: Mapping[str, float], columns: Columns, max_others: int) -> list[tuple[str, str]]:
    """The `columns` that `values` holds, then up to `max_others` of its other numbers, as (word, value)."""
    known = [key for key, _, _ in columns]
    others = [(key, key.replace("_", " "), ".4g") for key in values if key not in known][:max_others]
    return [(word, f"{values[key]:{style}}") for key, word, style in (*columns, *others)
            if key in values and (key not in ONLY_ABOVE_0 or values[key] > 0)]
