"""The reward of timed steps: cheap, and not constant. A separate module, so that workers need no torch."""

from __future__ import annotations

from reason_rl.records import Problem


def distinct_characters(problem: Problem, text: str) -> float:
    return float(len(set(text)))
