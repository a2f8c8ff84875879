"""Which verifier grades a task's answers, and whether that verifier can read the right answer.

`data` calls this for every row before training: a right answer that no verifier can read makes the row a bad
row. Left out: grading completions (math/, countdown.py, and programs in reason_rl/reward).
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

from reason_rl.answers.extract import find_answer
from reason_rl.answers.math import WORDS, quick_value, read_gold
from reason_rl.answers.math.tokens import Unreadable
from reason_rl.answers.program_names import program_names

VERIFIER_OF_TASK = {"countdown": "countdown", "gsm8k": "math", "math": "math", "jsonl": "math", "mbpp": "code", "code": "code"}
"""For reward.verifier "auto"; answers of any other task are compared as text."""

__all__ = ["find_answer", "verifier_of", "why_unreadable"]


def verifier_of(task: str, verifier: str = "auto") -> str:
    """The verifier itself, unless it is "auto": then the task's."""
    return VERIFIER_OF_TASK.get(task, "text") if verifier == "auto" else verifier


def why_unreadable(verifier: str, answer: str, facts: Mapping[str, Any]) -> str:
    """Why no completion could be right, or "" if one could. Missing facts are not checked here: a task lacks
    them in every row, and check_rewards reports that once."""
    if verifier == "code":
        return _why_untestable(facts) if "tests" in facts else ""
    if not answer.strip():
        return "its answer is empty"
    if verifier != "math" or quick_value(answer) is not None or WORDS.fullmatch(answer):
        return ""
    try:
        read_gold(answer)
    except Unreadable as error:
        return f"its answer {answer[:80]!r} cannot be read: {error}"
    return ""


def _why_untestable(facts: Mapping[str, Any]) -> str:
    parts = [facts.get("setup", ""), *facts["tests"]]
    try:
        for part in parts:
            ast.parse(part)
        program_names("\n".join(parts), facts.get("entry_points", ()))
    except (SyntaxError, ValueError, RecursionError) as error:
        return f"its tests cannot be run: {error}"
    return ""
