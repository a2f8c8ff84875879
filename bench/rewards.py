"""The reward of the timed steps, cheap and never constant; a module of its own: a verifier's worker starts without torch."""

from __future__ import annotations

from reason_rl.records import Problem


def distinct_characters(problem: Problem, text: str) -> float:
    return float(len(set(text)))
