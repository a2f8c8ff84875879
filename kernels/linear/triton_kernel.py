"""`linear` on a GPU: one GEMM kernel, read by three launchers through strides.

    fwd    y  [M, N] = x    [M, K] @ weight^T [K, N]
    dgrad  dx [M, K] = dy   [M, N] @ weight   [N, K]
    wgrad  dw [N, K] = dy^T [N, M] @ x        [M, K]

A program makes one tile of the result and walks the inner dimension in steps of BLOCK_K, first to last: no split, no atomics. Tile
sizes follow from the inner size and the dtype, never from the number of rows, and a tile has at least 64 rows whatever their number
(on sm_90 fewer would compile to another instruction, with another order of sums): so a row's bits do not depend on its batch.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from kernels.ahead_of_time import Compile, pointer
from kernels.triton_ops import DTYPES, IS_INTERPRETED

GROUP_M = 8
"""Row tiles that share a column of weight tiles while it is in L2."""


@triton.jit(do_not_specialize=["M"])
def gemm_kernel(
    a, b, c, M, N, K, stride_am, stride_ak, stride_bk, stride_bn, stride_cm,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, UPCAST: tl.constexpr,
):
    """c [M, N] = a [M, K] @ b [K, N], each by its strides; summed in f32, rounded once to c's dtype."""
    tile = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = tile // (GROUP_M * tiles_n)
    first_m = group * GROUP_M
    height = tl.minimum(tiles_m - first_m, GROUP_M)
    tile_m = first_m + tile % (GROUP_M * tiles_n) % height
    tile_n = tile % (GROUP_M * tiles_n) // height
    m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # 64 bits: M * K may pass 2^31
    n = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    a_rows = a + m[:, None] * stride_am
    b_columns = b + n[None, :] * stride_bn
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K).to(tl.int64)
        a_tile = tl.load(a_rows + k[None, :] * stride_ak, mask=(m[:, None] < M) & (k[None, :] < K), other=0.0)
        b_tile = tl.load(b_columns + k[:, None] * stride_bk, mask=(n[None, :] < N) & (k[:, None] < K), other=0.0)
        if UPCAST:  # the interpreter cannot multiply bf16
            a_tile, b_tile = a_tile.to(tl.float32), b_tile.to(tl.float32)
        total = tl.dot(a_tile, b_tile, total, input_precision="ieee")
    tl.store(c + m[:, None] * stride_cm + n[None, :], total.to(c.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))


def config(dtype: torch.dtype) -> dict[str, int]:
    """Tile and launch of one product, by the operands' dtype alone."""
    if dtype == torch.bfloat16:
        return {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP_M": GROUP_M, "num_warps": 8, "num_stages": 4}
    return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "GROUP_M": GROUP_M, "num_warps": 4, "num_stages": 3}


def gemm(c: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """c [M, N] contiguous = a [M, K] @ b [K, N], views of any strides, of one dtype."""
    (m, k), n = a.shape, b.shape[1]
    if not m or not n:
        return
    chosen = config(a.dtype)
    grid = (triton.cdiv(m, chosen["BLOCK_M"]) * triton.cdiv(n, chosen["BLOCK_N"]),)
    gemm_kernel[grid](a, b, c, m, n, k, *a.stride(), *b.stride(), c.stride(0), **chosen, UPCAST=IS_INTERPRETED)


def linear_fwd(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    gemm(y, x, weight.to(x.dtype).T)


def linear_dgrad(dx: torch.Tensor, dy: torch.Tensor, weight: torch.Tensor) -> None:
    gemm(dx, dy, weight.to(dy.dtype))


def linear_wgrad(dweight: torch.Tensor, dy: torch.Tensor, x: torch.Tensor) -> None:
    gemm(dweight, dy.T, x)


def compiles() -> list[Compile]:
    """The kernel in each form that the launchers use it."""
    found = []
    for dtype in DTYPES:
        # By launcher: which strides are 1, and the result's dtype.
        for name, ones, out in (
            ("linear_fwd", ("stride_ak", "stride_bk"), dtype), ("linear_dgrad", ("stride_ak", "stride_bn"), dtype),
            ("linear_wgrad", ("stride_am", "stride_bn"), torch.float32),
        ):
            strides = dict.fromkeys(("stride_am", "stride_ak", "stride_bk", "stride_bn", "stride_cm"), "i32")
            arguments: dict[str, Any] = {
                "a": pointer(dtype), "b": pointer(dtype), "c": pointer(out), "M": "i32", "N": "i32", "K": "i32", **strides}
            arguments |= dict.fromkeys(ones, 1)
            found.append(Compile(name, dtype, gemm_kernel, arguments, config(dtype) | {"UPCAST": False}, is_matrix_product=True))
    return found
