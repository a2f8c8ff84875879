"""The repetition penalty: how much of a completion says again what it has said, from -1 to 0.

    -(1 - distinct n-grams / n-grams)

over n-grams of words, signs and, in languages without spaces, characters (arXiv:2502.03373, appendix, and TRL's open-r1
recipe have the same). A completion shorter than n has none: 0. Some repetition is in all writing, so the weight should be
small.
"""

from __future__ import annotations

import re

PIECE = re.compile(r"[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+|\S")


def repetition_reward(text: str, n: int) -> float:
    pieces = PIECE.findall(text)
    grams = list(zip(*(pieces[offset:] for offset in range(n))))
    return len(set(grams)) / len(grams) - 1.0 if grams else 0.0
