"""Text for the terminal and the page: numbers as people write them, and completions made safe to print."""

from __future__ import annotations

BARS = "▁▂▃▄▅▆▇█"


def split_completion(prompt: str, text: str) -> tuple[str, str, str]:
    """(prompt, thought, answer), each through `printable`.

    The answer is the text between the answer tags, or all text after the thought when there are no such tags.
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
    """Replaces control characters: a model may write escape sequences, and a terminal would obey them."""
    return "".join(c if c.isprintable() or c == "\n" else "␛" if c == "\x1b" else "·" for c in text)


def shorten(text: str, length: int) -> str:
    """`text` on one line of at most `length` characters."""
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"


def sparkline(values: list[float], top: float, width: int) -> str:
    """One bar per value, scaled from 0 to `top` (0: to the largest value); the last `width` values."""
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


def percent(share: float | None) -> str:
    """0.165 -> '16.5%'; None -> ''"""
    return "" if share is None else f"{share:.1%}"


def decimal(value: float | None) -> str:
    """4.38 -> '4.4'; None -> ''"""
    return "" if value is None else f"{value:.1f}"


def small(value: float | None) -> str:
    """0.0000019 -> '1.9e-06'; None -> ''"""
    return "" if value is None else "0" if value == 0 else f"{value:.1e}"
