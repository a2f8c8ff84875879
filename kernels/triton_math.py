"""Functions shared by the Triton kernels: rounding a result, an exponential that is accurate far from 0, and
the order in which programs take the tiles of a matrix product."""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton_ops import IS_INTERPRETED

INTERPRETED = tl.constexpr(IS_INTERPRETED)


@triton.jit
def rounded(value, dtype: tl.constexpr):
    """f32 -> dtype, to nearest even. Triton's interpreter truncates to bf16 instead, so the rounding is done
    by hand there."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(dtype)


@triton.jit
def accurate_exp(x):
    """e^x for x <= 88 to about two ulp, and 0 below -87. tl.exp rounds x * log2(e) first, an error that grows
    with |x|."""
    turns = tl.floor(x * 1.4426950408889634 + 0.5)
        # ln 2 = 355 / 512, whose product with `turns` is exact, minus 2.1e-4.
    rest = (x - turns * 0.693359375) + turns * 2.12194440e-4
    return tl.where(x < -87.0, 0.0, tl.exp(rest) * tl.exp2(turns))


@triton.jit
def grouped_tile(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """-> (tile_m, tile_n) of a program. GROUP_M row tiles take one column tile of the other operand in turn,
    while it is in L2."""
    group = tile // (GROUP_M * tiles_n)
    first_m = group * GROUP_M
    height = tl.minimum(tiles_m - first_m, GROUP_M)
    return first_m + tile % (GROUP_M * tiles_n) % height, tile % (GROUP_M * tiles_n) // height
