"""The cosine length reward (arXiv:2502.03373, section 4.2): right answers should be short, wrong ones may
think longer.

    .venv/bin/python train.py configs/gsm8k.toml --name cosine --reward.accuracy=0 --reward.custom=examples.rewards.cosine:cosine

    short + (long - short) (1 - cos(pi length / max)) / 2      (short, long): RIGHT or WRONG, below
    cut at max                                                 CUT

It decides right or wrong with the math verifier, so use it for tasks whose answers that verifier reads. It
includes the accuracy, hence --reward.accuracy=0. Combine it with the repetition penalty: it has been
exploited by repetition.
"""

from __future__ import annotations

import math

from reason_rl.answers.math import grade_math
from reason_rl.records import FinishReason, Problem

RIGHT = (1.0, 0.5)
"""The rewards of a right completion without tokens, and of one with max_tokens."""
WRONG = (-1.0, -0.5)
CUT = -1.0


def cosine(problem: Problem, text: str, num_tokens: int, max_tokens: int, finish_reason: FinishReason) -> float:
    verdict = grade_math({"text": text, "answer": problem.answer})
    if not verdict.is_graded:
        return math.nan  # leaves the completion out of the update, as the accuracy does
    return on_curve(verdict.status == "right", num_tokens, max_tokens, finish_reason)


def on_curve(is_right: bool, num_tokens: int, max_tokens: int, finish_reason: FinishReason) -> float:
    if finish_reason == "length":
        return CUT
    short, long = RIGHT if is_right else WRONG
    return short + (long - short) * (1 - math.cos(math.pi * min(num_tokens, max_tokens) / max_tokens)) / 2
