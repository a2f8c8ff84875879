"""The soft overlong penalty of DAPO (arXiv:2503.14476, equation 13), as a reward from -1 to 0.

    length <= max - buffer            0
    max - buffer < length <= max      ((max - buffer) - length) / buffer
    cut at max                       -1
"""

from __future__ import annotations

from reason_rl.types import FinishReason


def overlong_reward(num_tokens: int, finish_reason: FinishReason, max_tokens: int, buffer: int) -> float:
    """num_tokens: the completion's, its end token included. buffer 0 leaves a penalty for cut completions only."""
    if finish_reason == "length":
        return -1.0
    excess = num_tokens - (max_tokens - buffer)
    return 0.0 if excess <= 0 else max(-1.0, -excess / buffer) if buffer > 0 else -1.0
