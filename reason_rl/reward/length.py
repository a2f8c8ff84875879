"""Rewards on a completion's length, in tokens, its end token included: arithmetic on numbers that the sampler knows.

Soft overlong (DAPO, arXiv:2503.14476, equation 13), from -1 to 0:
    length <= max - buffer            0
    max - buffer < length <= max      ((max - buffer) - length) / buffer
    cut at max                       -1
Cosine (arXiv:2502.03373, section 4.2), which wants right answers short and wrong ones long, since a wrong one needs more thought:
    short + (long - short) (1 - cos(pi length / max)) / 2      short, long: the reward's ends, a pair for right and one for wrong
    cut at max                                                 a reward of its own
"""

from __future__ import annotations

import math

from reason_rl.config import RewardConfig
from reason_rl.records import FinishReason


def overlong_reward(num_tokens: int, finish_reason: FinishReason, max_tokens: int, buffer: int) -> float:
    """buffer 0 leaves a penalty for cut completions only."""
    if finish_reason == "length":
        return -1.0
    excess = num_tokens - (max_tokens - buffer)
    return 0.0 if excess <= 0 else max(-1.0, -excess / buffer) if buffer > 0 else -1.0


def cosine_reward(is_right: bool, num_tokens: int, finish_reason: FinishReason, max_tokens: int, config: RewardConfig) -> float:
    if finish_reason == "length":
        return config.cosine_cut
    short, long = ((config.cosine_right_short, config.cosine_right_long) if is_right
                   else (config.cosine_wrong_short, config.cosine_wrong_long))
    return short + (long - short) * (1 - math.cos(math.pi * min(num_tokens, max_tokens) / max_tokens)) / 2
