"""`rope` on a GPU: one pass over memory, one tile of (token, head) rows per program. The backward pass
rotates by the negative angle.

Bytes moved per element: 2 * itemsize. A token's angles come from DRAM once, then from cache for its other
heads. Heads are read in place from a fused qkv matrix, by two strides.
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
    y,  # [T, H, 2 * HALF], contiguous
    x,  # [T, H, 2 * HALF], by its strides
    cos,  # f32[T, HALF]
    sin,  # f32[T, HALF]
    T, H, HALF, stride_t, stride_h, SIGN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """y = x rotated by SIGN times each token's angles."""
    # The (token, head) of each row.
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_R
    first_token = first_row // H  # the only 64-bit division
    # Counted from the first head of first_token.
    row = ((first_row - first_token * H).to(tl.int32) + tl.arange(0, BLOCK_R))[:, None]
    t = first_token + row // H
    c = tl.arange(0, BLOCK_C)[None, :]
    mask = (t < T) & (c < HALF)
    # The two halves of each head, rotated by the token's angles.
    source = x + t * stride_t + (row % H).to(tl.int64) * stride_h + c
    first = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
    cosine = tl.load(cos + t * HALF + c, mask=mask, other=0.0)
    sine = SIGN * tl.load(sin + t * HALF + c, mask=mask, other=0.0)
    target = y + (first_token * H + row) * 2 * HALF + c
    tl.store(target, rounded(first * cosine - second * sine, y.dtype.element_ty), mask=mask)
    tl.store(target + HALF, rounded(second * cosine + first * sine, y.dtype.element_ty), mask=mask)


def config(half: int) -> dict[str, int]:
    """The tile of a program, from the head dim alone."""
    width = triton.next_power_of_2(half)
    return {"BLOCK_R": max(1, TILE // width), "BLOCK_C": width, "num_warps": 4}


def _rotate(y: torch.Tensor, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: int) -> None:
    if not y.numel():
        return
    num_tokens, num_heads, head_dim = x.shape
    chosen = config(head_dim // 2)
    grid = (triton.cdiv(num_tokens * num_heads, chosen["BLOCK_R"]),)
    rope_fwd_kernel[grid](y, x, cos, sin, num_tokens, num_heads, head_dim // 2, x.stride(0), x.stride(1), SIGN=sign, **chosen)


def rope_fwd(y: torch.Tensor, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    _rotate(y, x, cos, sin, 1)


def rope_bwd(dx: torch.Tensor, dy: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    _rotate(dx, dy, cos, sin, -1)


def compiles() -> list[Compile]:
    found = []
    for dtype in DTYPES:
        for half in (16, 64):  # the heads of the default model, and of most models
            arguments = {"y": pointer(dtype), "x": pointer(dtype), "cos": "*fp32", "sin": "*fp32",
                         **dict.fromkeys(("T", "H", "HALF", "stride_t", "stride_h"), "i32")}
            options = config(half) | {"num_stages": 3}
            found += [Compile(f"{name} C{2 * half}", dtype, rope_fwd_kernel, arguments, options | {"SIGN": sign})
                      for name, sign in (("rope_fwd", 1), ("rope_bwd", -1))[: 1 if half == 16 else 2]]
    return found
