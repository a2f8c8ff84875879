"""Counter-based random numbers: Philox4x32-10 (Salmon et al. 2011), in torch integer arithmetic.

A (key, counter) gives the same bits on every device, in every batch, in any order. There is no state.
"""

from __future__ import annotations

import torch

MULTIPLIER_A, MULTIPLIER_B = 0xD2511F53, 0xCD9E8D57
WEYL_A, WEYL_B = 0x9E3779B9, 0xBB67AE85
MASK = 0xFFFFFFFF
NUM_ROUNDS = 10


def _high_low(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of a 32 x 32 bit product. The i64 product may wrap; its 64 bits are still
    right."""
    product = a * b
    return (product >> 32) & MASK, product & MASK


def philox(key: torch.Tensor, counter: tuple[torch.Tensor | int, ...]) -> torch.Tensor:
    """key i64[...] (64 bits); counter: up to four i64 words, broadcastable with key, the rest 0 -> i64[...,
    4] in [0, 2^32)."""
    key_a, key_b = key & MASK, (key >> 32) & MASK
    zero = torch.zeros_like(key)
    words = [(zero + word) & MASK for word in counter]
    c0, c1, c2, c3 = torch.broadcast_tensors(*words, *[zero] * (4 - len(words)))
    for _ in range(NUM_ROUNDS):
        high_a, low_a = _high_low(MULTIPLIER_A, c0)
        high_b, low_b = _high_low(MULTIPLIER_B, c2)
        c0, c1, c2, c3 = high_b ^ c1 ^ key_a, low_b, high_a ^ c3 ^ key_b, low_a
        key_a, key_b = (key_a + WEYL_A) & MASK, (key_b + WEYL_B) & MASK
    return torch.stack((c0, c1, c2, c3), dim=-1)


def uniform(key: torch.Tensor, position: torch.Tensor, num: int) -> torch.Tensor:
    """key, position i64[R] -> f64[R, num], uniform over the 2^32 midpoints (m + 1/2) / 2^32, never 0 or 1.

    Column v of row r is word v % 4 of the block with counter (v // 4, position[r]).
    """
    blocks = torch.arange((num + 3) // 4, device=key.device)
    words = philox(key[:, None], (blocks[None, :], position[:, None]))  # [R, num/4, 4]
    return (words.flatten(1)[:, :num].double() + 0.5) * 2.0**-32


def gumbel(key: torch.Tensor, position: torch.Tensor, num: int) -> torch.Tensor:
    """-> f32[R, num] of standard Gumbel noise, -log(-log(u)), at most 22.9. Computed in f64, which keeps the
    digits of log(u) near u = 1."""
    return -torch.log(-torch.log(uniform(key, position, num))).float()
