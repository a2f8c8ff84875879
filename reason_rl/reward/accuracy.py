"""Accuracy for tasks whose answers are compared as text, or by a small verifier of their own.

The answer is what stands in the completion's one answer block, white space around it aside. A completion without an
answer block, or with more than one opening or closing answer tag, has no answer and is wrong: several answers would be
several guesses. Whether the rest keeps the template is format.py's to say.

Left out: answers compared by value (math/), programs (code/).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from reason_rl.answers.countdown import is_countdown_solution
from reason_rl.answers.verdict import RIGHT, WRONG, Verdict, wrong

Request = Mapping[str, Any]


def grade_text_answer(request: Request) -> Verdict:
    """request: "text", "answer", "facts", and as "verifier" a name in `VERIFIERS`."""
    answer = extract_answer(request["text"])
    if answer is None:
        return wrong("no_answer")
    return RIGHT if VERIFIERS[request["verifier"]](request, answer) else WRONG


def extract_answer(text: str) -> str | None:
    """The inside of the one answer block, stripped; None when there is not exactly one."""
    if text.count("<answer>") != 1 or text.count("</answer>") != 1:
        return None
    _, _, rest = text.partition("<answer>")
    answer, closing, _ = rest.partition("</answer>")
    return answer.strip() if closing else None


def same_text(request: Request, answer: str) -> bool:
    return bool(answer == request["answer"])


def solves_countdown(request: Request, answer: str) -> bool:
    return is_countdown_solution(answer, request["facts"]["numbers"], request["facts"]["target"])


VERIFIERS: dict[str, Callable[[Request, str], bool]] = {"text": same_text, "countdown": solves_countdown}
