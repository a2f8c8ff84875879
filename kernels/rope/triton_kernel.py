"""`rope` on a GPU: one pass over memory, a tile of (token, head) rows a program; backward is the same turn the other way.

Bytes of an element: 2 * itemsize, and each token's angles once from DRAM, then from cache for its other heads. Heads are read where
they lie in a fused qkv matrix, through two strides.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.ahead_of_time import Compile, pointer
from kernels.triton_math import rounded
from kernels.triton_ops import DTYPES

TILE = 2048


@triton.jit(do_not_specialize=["T"])
def rope_fwd_kernel(
    y, x, cos, sin, T, H, HALF, stride_t, stride_h, SIGN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """y [T, H, 2 * HALF] contiguous = x, through its strides, turned by SIGN times each token's angles."""
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_R
    first_token = first_row // H  # the one division in 64 bits
    row = ((first_row - first_token * H).to(tl.int32) + tl.arange(0, BLOCK_R))[:, None]  # counted from its first head
    t = first_token + row // H
    c = tl.arange(0, BLOCK_C)[None, :]
    mask = (t < T) & (c < HALF)
    source = x + t * stride_t + (row % H).to(tl.int64) * stride_h + c
    first = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
    across = tl.load(cos + t * HALF + c, mask=mask, other=0.0)
    along = SIGN * tl.load(sin + t * HALF + c, mask=mask, other=0.0)
    target = y + (first_token * H + row) * 2 * HALF + c
    tl.store(target, rounded(first * across - second * along, y.dtype.element_ty), mask=mask)
    tl.store(target + HALF, rounded(second * across + first * along, y.dtype.element_ty), mask=mask)


def config(half: int) -> dict[str, int]:
    """A program's tile, by the head dim alone."""
    width = triton.next_power_of_2(half)
    return {"BLOCK_R": max(1, TILE // width), "BLOCK_C": width, "num_warps": 4}


def _turn(y: torch.Tensor, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: int) -> None:
    if not y.numel():
        return
    num_tokens, num_heads, head_dim = x.shape
    chosen = config(head_dim // 2)
    grid = (triton.cdiv(num_tokens * num_heads, chosen["BLOCK_R"]),)
    rope_fwd_kernel[grid](y, x, cos, sin, num_tokens, num_heads, head_dim // 2, x.stride(0), x.stride(1), SIGN=sign, **chosen)


def rope_fwd(y: torch.Tensor, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    _turn(y, x, cos, sin, 1)


def rope_bwd(dx: torch.Tensor, dy: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    _turn(dx, dy, cos, sin, -1)


def compiles() -> list[Compile]:
    found = []
    for dtype in DTYPES:
        for half in (16, 64):  # the default model's heads, and the usual ones
            arguments = {"y": pointer(dtype), "x": pointer(dtype), "cos": "*fp32", "sin": "*fp32",
                         **dict.fromkeys(("T", "H", "HALF", "stride_t", "stride_h"), "i32")}
            options = config(half) | {"num_stages": 3}
            found += [Compile(f"{name} C{2 * half}", dtype, rope_fwd_kernel, arguments, options | {"SIGN": sign})
                      for name, sign in (("rope_fwd", 1), ("rope_bwd", -1))[: 1 if half == 16 else 2]]
    return found
