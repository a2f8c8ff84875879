"""A penalty on repetition in a completion, from -1 (nothing but repetition) to 0.

    .venv/bin/python train.py --name repetition --reward.custom=examples.rewards.repetition:penalty --reward.custom_weight=0.05

    -(1 - distinct n-grams / n-grams)

The n-grams are of words, signs and, in languages without spaces, characters (arXiv:2502.03373, appendix;
TRL's open-r1 recipe has the same penalty). A completion of fewer than NGRAM words scores 0. All prose repeats
something, so the weight should be small.
"""

from __future__ import annotations

import re

NGRAM = 5
WORD = re.compile(r"[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+|\S")


def penalty(text: str) -> float:
    return repetition(text, NGRAM)


def repetition(text: str, n: int) -> float:
    words = WORD.findall(text)
    grams = list(zip(*(words[offset:] for offset in range(n))))
    return len(set(grams)) / len(grams) - 1.0 if grams else 0.0
