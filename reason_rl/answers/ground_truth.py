"""Which verifier a task's answers go to, and whether it can read them: what is known of a problem before any completion of it.

The one file of this room that `data` asks: a row whose right answer no verifier can read is a bad row, and only the verifier knows.
Left out: grading (grade.py).
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

from reason_rl.answers.math import WORDS, quick_value, read_gold
from reason_rl.answers.math.extract import find_answer
from reason_rl.answers.math.tokens import Unreadable
from reason_rl.config import RewardConfig
from reason_rl.sandbox.program_names import program_names

VERIFIER_OF_TASK = {"countdown": "countdown", "gsm8k": "math", "math": "math", "jsonl": "math", "mbpp": "code", "code": "code"}
"""Where reward.verifier is "auto"; any other task's answers are compared as text."""

__all__ = ["find_answer", "verifier_of", "why_unreadable"]


def verifier_of(task: str, config: RewardConfig) -> str:
    return VERIFIER_OF_TASK.get(task, "text") if config.verifier == "auto" else config.verifier


def why_unreadable(verifier: str, answer: str, facts: Mapping[str, Any]) -> str:
    """Why no completion could be right, whatever it says; "" where one could. Facts that a task does not have at all are
    check_rewards's to say."""
    if verifier == "code":
        return _why_no_exam(facts) if "tests" in facts else ""
    if not answer.strip():
        return "its answer is empty"
    if verifier != "math" or quick_value(answer) is not None or WORDS.fullmatch(answer):
        return ""
    try:
        read_gold(answer)
    except Unreadable as error:
        return f"its answer {answer[:80]!r} cannot be read: {error}"
    return ""


def _why_no_exam(facts: Mapping[str, Any]) -> str:
    parts = [facts.get("setup", ""), *facts["tests"]]
    try:
        for part in parts:
            ast.parse(part)
        program_names("\n".join(parts), facts.get("entry_points", ()))
    except (SyntaxError, ValueError, RecursionError) as error:
        return f"its tests cannot be run: {error}"
    return ""
