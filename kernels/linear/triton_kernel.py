"""`linear` on a GPU: one GEMM kernel, which three launchers call with different strides.

    fwd    y  [M, N] = x    [M, K] @ weight^T [K, N]
    dgrad  dx [M, K] = dy   [M, N] @ weight   [N, K]
    wgrad  dw [N, K] = dy^T [N, M] @ x        [M, K]

A program computes one tile of the result. It walks the inner dimension in steps of BLOCK_K, first to last,
without atomics. Tile sizes follow from the weight's sizes and the dtype, never from the number of rows, and a
tile has at least 64 rows (on sm_90 fewer would compile to another instruction, with another order of sums):
so a row's bits do not depend on its batch. Only wgrad, whose sum runs over the rows, is split along them, if
the weight has too few tiles to fill a GPU: into f32 parts, by the sizes alone, summed in order.

Flops: 2MNK each. A 128 x 256 tile with BLOCK_K 64 reads 48 KB of bf16 per step of 4.2 MFLOP, 85 flops per
byte of L2. It keeps 128 sums per thread in registers, so one program of 8 warps runs per SM; its 4 stages
take 192 KB of shared memory. Row tiles run in groups of GROUP_M, which share weight tiles in L2. Narrow
weights get narrow tiles: more programs, and fewer wasted columns.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from kernels.ahead_of_time import Compile, pointer
from kernels.triton_math import grouped_tile, rounded
from kernels.triton_ops import DTYPES, IS_INTERPRETED

PROGRAMS = 256
"""wgrad splits its rows to reach this number of programs: about two per SM of a large GPU."""
MIN_ROWS = 512
"""Fewest rows of a part: below, writing and summing the part would cost more than it gains."""


@triton.jit
def product_tile(
    total,  # f32[BLOCK_M, BLOCK_N], in registers
    a,  # [M, K]
    b,  # [K, N]
    m,  # i64[BLOCK_M]
    n,  # i64[BLOCK_N]
    M, N, first, last, stride_am, stride_ak, stride_bk, stride_bn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, UPCAST: tl.constexpr,
):
    """f32[BLOCK_M, BLOCK_N] = total + a[m, first:last] @ b[first:last, n], summed in order. m and n may
    exceed M and N. EVEN_K: last - first is a multiple of BLOCK_K."""
    k = first + tl.arange(0, BLOCK_K).to(tl.int64)
    a_tile = a + m[:, None] * stride_am + k[None, :] * stride_ak
    b_tile = b + k[:, None] * stride_bk + n[None, :] * stride_bn
    is_row, is_column = m[:, None] < M, n[None, :] < N
    # One step of BLOCK_K terms at a time.
    for start in range(first, last, BLOCK_K):
        if EVEN_K:
            x = tl.load(a_tile, mask=is_row, other=0.0)
            y = tl.load(b_tile, mask=is_column, other=0.0)
        else:
            left = tl.arange(0, BLOCK_K) < last - start
            x = tl.load(a_tile, mask=is_row & left[None, :], other=0.0)
            y = tl.load(b_tile, mask=is_column & left[:, None], other=0.0)
        if UPCAST:  # Triton's interpreter cannot multiply bf16
            x, y = x.to(tl.float32), y.to(tl.float32)
        total = tl.dot(x, y, total, input_precision="ieee")
        a_tile += BLOCK_K * stride_ak
        b_tile += BLOCK_K * stride_bk
    return total


@triton.jit
def halves(x):
    """[M, N] -> (left half, right half), [M, N / 2] each."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def add_and_store(c, addend, total, m, row, first, M, N):
    column = tl.arange(0, total.shape[1])
    place = (row + first)[:, None] + column[None, :]
    inside = (m[:, None] < M) & (column[None, :] < N - first)
    tl.store(c + place, rounded(total + tl.load(addend + place, mask=inside, other=0.0), c.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M"])
def gemm_kernel(
    a,  # [M, K], by its strides
    b,  # [K, N], by its strides
    c,  # [parts, M, N], rows by stride_cm
    addend,  # f32, like c; c again without HAS_ADDEND
    M, N, K, cut, stride_am, stride_ak, stride_bk, stride_bn, stride_cm,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr, HAS_ADDEND: tl.constexpr, UPCAST: tl.constexpr,
):
    """c[i] = a @ b (+ addend) over the i-th `cut` of K; summed in f32, rounded once to c's dtype."""
    # The product of this program's tile.
    tile_m, tile_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # 64 bits: M * K may pass 2^31
    n = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(1)
    total = product_tile(tl.zeros((BLOCK_M, BLOCK_N), tl.float32), a, b, m, n, M, N, part * cut, tl.minimum(part * cut + cut, K),
                         stride_am, stride_ak, stride_bk, stride_bn, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, UPCAST)
    # Rounded and stored.
    row = (part.to(tl.int64) * M + m) * stride_cm
    if HAS_ADDEND:  # one half of the tile at a time, so that the addend needs few registers
        left, right = halves(total)
        add_and_store(c, addend, left, m, row, tile_n * BLOCK_N, M, N)
        add_and_store(c, addend, right, m, row, tile_n * BLOCK_N + BLOCK_N // 2, M, N)
    else:
        tl.store(c + row[:, None] + n[None, :], rounded(total, c.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))


def config(dtype: torch.dtype, columns: int, inner: int) -> dict[str, int]:
    """Tile and launch options of a product with `columns` columns, each a sum of `inner` terms: from the
    weight's sizes alone."""
    if dtype == torch.bfloat16:
        if columns >= 2048 and inner >= 1024:
            block_n, num_warps = 256, 8
        else:
            block_n, num_warps = (128, 8) if columns >= 512 else (64, 4)
        return {"BLOCK_M": 128, "BLOCK_N": block_n, "BLOCK_K": 64, "GROUP_M": 8, "num_warps": num_warps, "num_stages": 4}
    if columns > 32:
        block_n, num_warps = (128, 8) if columns > 64 else (64, 4)
        return {"BLOCK_M": 128, "BLOCK_N": block_n, "BLOCK_K": 16, "GROUP_M": 8, "num_warps": num_warps, "num_stages": 3}
    return {"BLOCK_M": 64, "BLOCK_N": 32 if columns > 16 else 16, "BLOCK_K": 32, "GROUP_M": 8, "num_warps": 4, "num_stages": 3}


def gemm(
    c: torch.Tensor, a: torch.Tensor, b: torch.Tensor, chosen: dict[str, int], addend: torch.Tensor | None = None, cut: int = 0
) -> None:
    """c [M, N] = a [M, K] @ b [K, N] (+ addend f32, with c's layout). a and b have any strides and one dtype.
    With `cut`, a multiple of BLOCK_K, each part of K gives a result: c is [ceil(K / cut), M, N]."""
    (m, k), n = a.shape, b.shape[1]
    if not m or not n:
        return
    grid = (triton.cdiv(m, chosen["BLOCK_M"]) * triton.cdiv(n, chosen["BLOCK_N"]), triton.cdiv(k, cut) if cut else 1)
    gemm_kernel[grid](
        a, b, c, c if addend is None else addend, m, n, k, cut or k, *a.stride(), *b.stride(), c.stride(-2), **chosen,
        EVEN_K=k % chosen["BLOCK_K"] == 0, HAS_ADDEND=addend is not None, UPCAST=IS_INTERPRETED)


def linear_fwd(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    gemm(y, x, weight.to(x.dtype).T, config(x.dtype, *weight.shape))


def linear_dgrad(dx: torch.Tensor, dy: torch.Tensor, weight: torch.Tensor, addend: torch.Tensor | None = None) -> None:
    gemm(dx, dy, weight.to(dy.dtype), config(dy.dtype, *weight.shape[::-1]), addend)


def linear_wgrad(dweight: torch.Tensor, dy: torch.Tensor, x: torch.Tensor, addend: torch.Tensor | None = None) -> None:
    (num_rows, n), k = dy.shape, x.shape[1]
    chosen = config(dy.dtype, k, n)
    tiles = triton.cdiv(n, chosen["BLOCK_M"]) * triton.cdiv(k, chosen["BLOCK_N"])
    num_parts = min(PROGRAMS // max(tiles, 1), num_rows // MIN_ROWS)
    if num_parts < 2:
        return gemm(dweight, dy.T, x, chosen, addend)
    cut = triton.cdiv(triton.cdiv(num_rows, num_parts), chosen["BLOCK_K"]) * chosen["BLOCK_K"]
    parts = dweight.new_empty(triton.cdiv(num_rows, cut), n, k)
    gemm(parts, dy.T, x, chosen, cut=cut)
    dweight.copy_(parts.sum(0) if addend is None else addend + parts.sum(0))


# (N, K) of the weights in `compiles`: the default model's router, qkv and experts, then wide ones.
SIZES = ((8, 128), (64, 128), (192, 128), (128, 96), (1024, 2048), (4096, 4096))


def compiles() -> list[Compile]:
    """The kernel in each specialisation that the launchers use."""
    found: dict[str, Compile] = {}
    for dtype in DTYPES:
        for n, k in SIZES:
            # By launcher: the strides that are 1, columns and inner size, and the result's dtype.
            for name, ones, columns, inner, out in (
                ("linear_fwd", ("stride_ak", "stride_bk"), n, k, dtype), ("linear_dgrad", ("stride_ak", "stride_bn"), k, n, dtype),
                ("linear_wgrad", ("stride_am", "stride_bn"), k, n, torch.float32),
            ):
                for has_addend in (False, True)[: 1 + (name != "linear_fwd" and n >= 1024)]:
                    what = specialise(name, dtype, config(dtype, columns, inner), inner, ones, out, has_addend)
                    found[f"{what.name} {dtype}"] = what
    return list(found.values())


def specialise(
    name: str, dtype: torch.dtype, chosen: dict[str, int], inner: int, ones: tuple[str, ...], out: torch.dtype, has_addend: bool
) -> Compile:
    # wgrad's inner size is the number of rows, which need not be a multiple of BLOCK_K.
    options = chosen | {"EVEN_K": name != "linear_wgrad" and inner % chosen["BLOCK_K"] == 0, "HAS_ADDEND": has_addend,
                        "UPCAST": False}
    arguments: dict[str, Any] = {"a": pointer(dtype), "b": pointer(dtype), "c": pointer(out), "addend": pointer(torch.float32)}
    arguments |= dict.fromkeys(("M", "N", "K", "cut"), "i32")
    arguments |= dict.fromkeys(("stride_am", "stride_ak", "stride_bk", "stride_bn", "stride_cm"), "i32")
    name += f" {chosen['BLOCK_M']}x{chosen['BLOCK_N']}{' even' if options['EVEN_K'] else ''}{' addend' if has_addend else ''}"
    return Compile(name, dtype, gemm_kernel, arguments | dict.fromkeys(ones, 1), options, is_matrix_product=True,
                   may_spill=dtype == torch.bfloat16)  # some bytes on sm_80 and sm_100
