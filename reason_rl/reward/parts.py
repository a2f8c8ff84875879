"""The quick parts of the reward: the format, the overlong penalty, and accuracy for answers compared as text.

Format: does the completion keep R1-Zero's template and then stop? Each tag once, in this order, with nothing
before, between or after, not even white space. The contents of the tags do not matter: an empty thought is
well formed.
    <think>...</think><answer>...</answer> end

Overlong: DAPO's soft penalty on the length in tokens, end token included (arXiv:2503.14476, equation 13):
    length <= max - buffer            0
    max - buffer < length <= max      ((max - buffer) - length) / buffer
    cut at max                       -1
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from reason_rl.answers.countdown import is_countdown_solution
from reason_rl.answers.extract import extract_answer
from reason_rl.answers.verdict import RIGHT, WRONG, Verdict, wrong
from reason_rl.records import FinishReason

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
Request = Mapping[str, Any]


def grade_text(request: Request) -> Verdict:
    """Every part that the text alone decides, in one request to the verifier service; linear in the text's
    length.

    request: "text", "answer", "facts", "finish_reason", "verifier". The verdict is the accuracy if the
    verifier is one of `TEXT_VERIFIERS`; the format is a part of it.
    """
    text = request["text"]
    parts = {"format": format_reward(text, request["finish_reason"])}
    verdict = _accuracy(request) if request["verifier"] in TEXT_VERIFIERS else RIGHT
    return Verdict(verdict.status, verdict.cause, verdict.value, verdict.detail, parts)


def _accuracy(request: Request) -> Verdict:
    answer = extract_answer(request["text"])
    if answer is None:
        return wrong("no_answer")
    return RIGHT if TEXT_VERIFIERS[request["verifier"]](request, answer) else WRONG


def _is_same_text(request: Request, answer: str) -> bool:
    return bool(answer == request["answer"])


def _solves_countdown(request: Request, answer: str) -> bool:
    return is_countdown_solution(answer, request["facts"]["numbers"], request["facts"]["target"])


TEXT_VERIFIERS: dict[str, Callable[[Request, str], bool]] = {"text": _is_same_text, "countdown": _solves_countdown}


def format_reward(text: str, finish_reason: FinishReason) -> float:
    """1.0 or 0.0. text: the completion without its end token; finish_reason "length": it was cut."""
    is_well_formed = (finish_reason == "stop"
                      and all(text.count(tag) == 1 for tag in TAGS)
                      and text.startswith("<think>")
                      and "</think><answer>" in text
                      and text.endswith("</answer>"))
    return 1.0 if is_well_formed else 0.0


def overlong_reward(num_tokens: int, finish_reason: FinishReason, max_tokens: int, buffer: int) -> float:
    """-1.0 to 0.0. buffer 0: only a cut completion is penalised."""
    if finish_reason == "length":
        return -1.0
    excess = num_tokens - (max_tokens - buffer)
    return 0.0 if excess <= 0 else max(-1.0, -excess / buffer) if buffer > 0 else -1.0
