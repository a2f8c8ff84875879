"""What a run shows in the terminal: a live view where there is one, plain lines where there is none.

The loop calls `view.update` once a step with the dictionaries it also logs. A view only reads them: whatever goes wrong
while drawing is swallowed, so it can never end a run, and Ctrl-C (no `Exception`) passes through.
`make_view` picks: a silent view on every rank but 0, `LiveView` (rich) on a terminal, `PlainView` for pipes, CI,
NO_COLOR and TERM=dumb. Left out: curves in detail (report.py).
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

Method = TypeVar("Method", bound=Callable[..., None])
BARS = "▁▂▃▄▅▆▇█"
SAMPLE_EVERY_S = 5.0
"""A live sample stays this long before the next replaces it: it is there to be read."""
PLAIN_LINES = {"pretrain": 20, "rl": 100}
"""About how many lines of a phase go to a log."""
COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("reward", "reward", ".3f"), ("accuracy", "right", ".1%"), ("format_rate", "format", ".1%"),
    ("thinking_tokens", "thinking", ".1f"), ("length", "length", ".1f"), ("thinks_share", "thinks", ".0%"),
    ("kl", "KL", ".2g"), ("approx_kl", "KL to old policy", ".2g"),
    ("entropy", "entropy", ".3f"), ("max_abs_logprob_gap", "logprob gap", ".1e"),
    ("groups_without_signal", "no signal", ".0%"), ("loss", "loss", ".4f"), ("lr", "lr", ".1e"),
    ("grad_norm", "grad norm", ".2f"), ("ungraded", "ungraded", ".0f"),
)
"""Metric, its word on the screen, its format."""
ONLY_IF_ANY = ("ungraded",)
"""Shown when above 0: a run where all is well does not speak of it."""


def never_raises(method: Method) -> Method:
    """Drawing must not end a run. Only `Exception` is caught: KeyboardInterrupt and SystemExit rise."""

    @functools.wraps(method)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            method(*args, **kwargs)
        except Exception:
            return

    return guarded  # type: ignore[return-value]


class View:
    """The silent view, and the state that the others draw from."""

    def __init__(self, title: str = "") -> None:
        self.title = title
        self.phase_name, self.total, self.step, self.detail = "", 0, 0, ""
        self.phase_started_s = self.started_s = time.monotonic()
        self.first_step = 0
        self.latest: dict[str, float] = {}
        self.rates: dict[str, float] = {}
        self.heldout: list[tuple[int, float]] = []
        self.thinking: list[tuple[int, float]] = []

    def __enter__(self) -> View:
        return self

    def __exit__(self, *exception: object) -> None:
        return None

    @never_raises
    def phase(self, name: str, total: int, start: int = 0, detail: str = "") -> None:
        """A new stretch of work, e.g. ("pretrain", 2000); `start` is where a resumed run stands."""
        self.phase_name, self.total, self.step, self.detail = name, total, start, detail
        self.first_step, self.phase_started_s = start, time.monotonic()
        self.latest, self.rates = {}, {}
        self._changed("phase")

    @never_raises
    def update(self, step: int, metrics: Mapping[str, Any], timings: Mapping[str, Any] | None = None,
               phase: str = "") -> None:
        """One step's numbers, as logged. `phase="eval"` tells of a held-out evaluation at RL step `step`."""
        if (phase or self.phase_name) == "eval" and metrics.get("accuracy") is not None:
            self.heldout.append((step, float(metrics["accuracy"])))
            if metrics.get("mean_thinking_tokens") is not None:
                self.thinking.append((step, float(metrics["mean_thinking_tokens"])))
            self._changed("eval", metrics)
            return
        self.step = step
        self.latest = {key: value for key, value in metrics.items() if isinstance(value, int | float)}
        self.rates = {key: value for key, value in (timings or {}).items() if key.endswith("_tok_s") and value}
        self._changed("step")

    @never_raises
    def sample(self, prompt: str, text: str, reward: float, is_right: bool | None = None) -> None:
        """A completion to look at; `is_right=None` shows the reward without a verdict."""
        self._show_sample(split_completion(prompt, text), reward, is_right)

    @never_raises
    def message(self, text: str) -> None:
        self._say(printable(text))

    def time_left_s(self) -> float | None:
        """Seconds left of the phase at its pace so far; None before its first step."""
        done = self.step - self.first_step
        if done <= 0 or not self.total:
            return None
        return (time.monotonic() - self.phase_started_s) / done * max(0, self.total - self.step)

    def cells(self) -> list[tuple[str, str]]:
        """The latest numbers as (word, value)."""
        return [(word, f"{self.latest[key]:{form}}") for key, word, form in COLUMNS
                if key in self.latest and (key not in ONLY_IF_ANY or self.latest[key] > 0)]

    def _changed(self, what: str, metrics: Mapping[str, Any] | None = None) -> None:
        return None

    def _show_sample(self, parts: tuple[str, str, str], reward: float, is_right: bool | None) -> None:
        return None

    def _say(self, text: str) -> None:
        return None


class PlainView(View):
    """One line per noteworthy moment, for logs: some twenty of a pretraining, up to a hundred of RL."""

    def __init__(self, title: str, console: Console) -> None:
        super().__init__(title)
        self.console = console
        self.num_samples = 0

    def __enter__(self) -> View:
        self.message(self.title)
        return self

    def _changed(self, what: str, metrics: Mapping[str, Any] | None = None) -> None:
        if what == "phase":
            self._say(f"{self.phase_name}: {self.total - self.first_step} steps"
                      + (f" from step {self.first_step}" if self.first_step else "")
                      + (f", {self.detail}" if self.detail else ""))
        elif what == "eval":
            step, accuracy = self.heldout[-1]
            values = metrics or {}
            words = [f"held-out accuracy {accuracy:.1%}"]
            for key, word, form in (("mean_thinking_tokens", "thinking", ".1f"), ("thinks_share", "thinks", ".0%"),
                                    ("accuracy_given_thought", "right given a thought", ".1%"),
                                    ("accuracy_given_none", "given none", ".1%"), ("format_rate", "format", ".1%")):
                if values.get(key) is not None:
                    words.append(f"{word} {values[key]:{form}}")
            self._say(f"eval      step {step}  " + "  ".join(words))
        else:
            every = max(1, self.total // PLAIN_LINES.get(self.phase_name, 50))
            if self.step % every == 0 or self.step in (self.first_step + 1, self.total):
                self._say(self._step_line())

    def _step_line(self) -> str:
        words = [f"{self.phase_name:<9} {self.step}/{self.total}"]
        words += [f"{word} {value}" for word, value in self.cells()]
        words += [f"{name} {count(rate)} tok/s" for name, rate in rate_words(self.rates)]
        left = self.time_left_s()
        if left is not None:
            words.append(f"{duration(left)} left")
        return "  ".join(words)

    def _show_sample(self, parts: tuple[str, str, str], reward: float, is_right: bool | None) -> None:
        prompt, thought, answer = parts
        verdict = {True: "right", False: "wrong", None: ""}[is_right]
        self._say(f"  sample  {shorten(prompt, 120)}  thought: {shorten(thought, 240) or '(none)'}  "
                  f"answer: {shorten(answer, 60)}  reward {reward:.2f} {verdict}".rstrip())

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


class LiveView(View):
    """The same facts as one redrawn panel: progress, latest numbers, curves so far, and a sample now and then."""

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
            parts = [top, self._numbers(), self._curves(), self.shown_sample]
            return Group(*[Padding(part, (0, 0, 1, 0)) for part in parts if part is not None])
        except Exception:  # drawn from rich's own thread: a traceback there would tear the screen
            return Text(f"{self.phase_name} {self.step}/{self.total}")

    def _header(self) -> RenderableType:
        elapsed = duration(time.monotonic() - self.started_s)
        return Text.assemble((self.title, "bold cyan"), ("   " + elapsed, "dim"))

    def _progress(self) -> RenderableType:
        width = max(10, min(46, self.console.width - 46))
        share = min(1.0, self.step / self.total) if self.total else 0.0
        filled = round(share * width)
        left = self.time_left_s()
        tail = f"  {duration(left)} left" if left is not None else f"  {self.detail}" if self.detail else ""
        return Text.assemble((f"{self.phase_name:<9}", "bold"), ("━" * filled, "cyan"),
                             ("━" * (width - filled), "grey35"), f"  {self.step}/{self.total}", (tail, "dim"))

    def _numbers(self) -> RenderableType | None:
        """Name above value, as many a row as the window has room for."""
        cells = self.cells()
        cells += [(f"{name} tok/s", count(rate)) for name, rate in rate_words(self.rates)]
        if self.heldout:
            cells.insert(0, ("held-out", f"{self.heldout[-1][1]:.1%}"))
        if not cells:
            return None
        a_row = max(1, min(8, self.console.width // 13))
        table = Table.grid(padding=(0, 2))
        for start in range(0, len(cells), a_row):
            row = cells[start:start + a_row]
            table.add_row(*[Text(word, style="dim") for word, _ in row])
            table.add_row(*[Text(value, style="bold green" if word == "held-out" else "bold") for word, value in row])
        return table

    def _curves(self) -> RenderableType | None:
        if len(self.heldout) < 2:
            return None
        table = Table.grid(padding=(0, 2))
        for name, points, top, form in (("held-out accuracy", self.heldout, 1.0, ".1%"),
                                        ("thinking tokens", self.thinking, 0.0, ".1f")):
            if points:
                values = [value for _, value in points]
                table.add_row(Text(name, style="dim"), Text(sparkline(values, top, 32), style="cyan"),
                              f"{values[0]:{form}} → {values[-1]:{form}}")
        return table


def make_view(title: str, rank: int = 0, console: Console | None = None) -> View:
    """The view that fits where the output goes; use it as a context manager."""
    if rank != 0:
        return View(title)
    console = console or Console()
    plain = (os.environ.get("NO_COLOR") or os.environ.get("CI") or os.environ.get("TERM") == "dumb"
             or not console.is_terminal)
    return PlainView(title, console) if plain else LiveView(title, console)


def split_completion(prompt: str, text: str) -> tuple[str, str, str]:
    """(prompt, thought, answer) as shown: control characters, escape sequences among them, made harmless.

    The answer is what stands between its tags, else whatever follows the thought.
    """
    before, think, rest = text.partition("<think>")
    thought, closed, tail = rest.partition("</think>")
    if not think:
        thought, tail = "", before
    elif not closed:
        thought, tail = rest, ""
    _, opened, inside = tail.partition("<answer>")
    answer = inside.partition("</answer>")[0] if opened else tail
    return printable(prompt), printable(thought.strip()), printable(answer.strip())


def printable(text: str) -> str:
    """Text of a model may hold escape sequences; a terminal must not obey them."""
    return "".join(c if c.isprintable() or c == "\n" else "␛" if c == "\x1b" else "·" for c in text)


def shorten(text: str, length: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"


def rate_words(rates: Mapping[str, float]) -> list[tuple[str, float]]:
    """{"rollout_tok_s": 3e4} -> [("rollout", 3e4)]"""
    return [(key.removesuffix("_tok_s"), rate) for key, rate in rates.items()]


def sparkline(values: list[float], top: float, width: int) -> str:
    """One bar a value, from 0 to `top` (0: to the largest); the latest `width` of them."""
    top = top or max(values) or 1.0
    return "".join(BARS[min(7, max(0, int(value / top * 8)))] for value in values[-width:])


def duration(seconds: float) -> str:
    """75 -> '1m15s'"""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"


def count(value: float) -> str:
    """32100.0 -> '32.1k'"""
    if value >= 1e6:
        return f"{value / 1e6:.1f}M"
    return f"{value / 1e3:.1f}k" if value >= 1e3 else f"{value:.0f}"
