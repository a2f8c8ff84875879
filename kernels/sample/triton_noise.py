"""The noise of philox.py in Triton: Philox4x32-10 keyed by (key, position), and -log(-log(u)) in f64, or
approximately in f32."""

from __future__ import annotations

import triton
import triton.language as tl

NOISE_ERROR = tl.constexpr(5e-6)
"""Bounds |gumbel_near - gumbel|: two f32 logs, each off by an ulp or two of at most 23, and the rounding of 1
- x."""


@triton.jit
def philox_words(key, position, block):
    """Words 4 * block .. 4 * block + 3 of (key, position), u32. key i64, position i64 and block i32
    broadcast."""
    zero = block * 0
    return tl.philox(key, block, position.to(tl.uint32), zero, zero)


@triton.jit
def gumbel(word):
    """u32 -> f32 noise, rounded once."""
    return (-tl.log(-tl.log((word.to(tl.float64) + 0.5) * 2.3283064365386963e-10))).to(tl.float32)


@triton.jit
def gumbel_near(word):
    """u32 -> f32 noise, to within NOISE_ERROR: enough to skip the tokens that cannot win."""
    below_one = ((word ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    is_high = word >= 0x80000000
    # Near u = 1, with x = 1 - u: -log(1 - x) by its series.
    x = tl.where(is_high, below_one, 0.0)
    series = x * (1.0 / 12) + 1.0 / 11
    series = series * x + 1.0 / 10
    series = series * x + 1.0 / 9
    series = series * x + 1.0 / 8
    series = series * x + 1.0 / 7
    series = series * x + 1.0 / 6
    series = series * x + 1.0 / 5
    series = series * x + 1.0 / 4
    series = series * x + 1.0 / 3
    series = series * x + 0.5
    series = (series * x + 1.0) * x
    u = tl.where(is_high, 1.0 - below_one, (word.to(tl.float32) + 0.5) * 2.3283064365386963e-10)
    return -tl.log(tl.where(is_high & (below_one < 0.25), series, -tl.log(u)))
