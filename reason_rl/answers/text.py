"""`grade_text`: all that is read off a completion's text alone, in one request: a kind of the verifier service.

The verdict is the accuracy's, for tasks whose answers are compared as text; its parts are format, language and repetition,
those that are asked for. Each is linear in the text's length.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reason_rl.answers.verdict import RIGHT, Verdict
from reason_rl.reward.accuracy import VERIFIERS, grade_text_answer
from reason_rl.reward.format import format_reward
from reason_rl.reward.language import language_reward
from reason_rl.reward.repetition import repetition_reward


def grade_text(request: Mapping[str, Any], has_language: bool, repetition_ngram: int) -> Verdict:
    """request: "text", "prompt", "answer", "facts", "finish_reason", "verifier". repetition_ngram 0: not asked for."""
    text = request["text"]
    parts = {"format": format_reward(text, request["finish_reason"])}
    if has_language:
        parts["language"] = language_reward(request["prompt"], text)
    if repetition_ngram:
        parts["repetition"] = repetition_reward(text, repetition_ngram)
    verdict = grade_text_answer(request) if request["verifier"] in VERIFIERS else RIGHT
    return Verdict(verdict.status, verdict.cause, verdict.value, verdict.detail, parts)
