"""`rms_norm` on a GPU, of x or of x + residual: one pass over memory forward and one backward, with whole
rows in registers.

A program holds a tile of whole rows: one wide row, or as many narrow rows (a head's) as fill TILE elements.
Tile and warps follow from the row's size alone, and a row is reduced over its own columns only, so its bits
do not depend on the batch.

Bytes moved per element, times itemsize: 2 forward, 3 backward; for add_rms_norm 4 and 4. dweight: each of at
most MAX_PARTS programs sums its rows in order into a part f32[D], and a second kernel adds the parts in
order. The parts stay in L2. The number of rows decides their split; only the gradient of a weight may depend
on it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from kernels.ahead_of_time import Compile, pointer
from kernels.triton_math import rounded
from kernels.triton_ops import DTYPES

TILE = 1024
MAX_PARTS = 1024
"""About eight per multiprocessor of the largest GPUs: about as many as run at once, enough to hide memory
latency."""


@triton.jit
def row_offsets(first_row, inner, stride_outer, stride_inner, BLOCK_R: tl.constexpr):
    """The offset of each of BLOCK_R rows of x [outer, inner, D], i64[BLOCK_R, 1], with one 64-bit
    division."""
    outer = first_row // inner
    row = (first_row - outer * inner).to(tl.int32) + tl.arange(0, BLOCK_R)
    return ((outer + row // inner) * stride_outer + (row % inner).to(tl.int64) * stride_inner)[:, None]


@triton.jit
def row_scale(x, D, eps):
    """x f32[BLOCK_R, BLOCK_D], zeros past D -> 1 / sqrt(mean(x^2) + eps), [BLOCK_R, 1]."""
    return tl.div_rn(1.0, tl.sqrt_rn(tl.sum(x * x, axis=1) / D + eps))[:, None]


@triton.jit(do_not_specialize=["num_rows"])
def rms_norm_fwd_kernel(
    y,  # [num_rows, D], contiguous
    total,  # like y; y again without HAS_RESIDUAL
    x,  # [num_rows, D] by its strides, or [num_rows / inner, inner, D]
    residual,  # like y; x again without HAS_RESIDUAL
    weight,  # f32[D]
    eps, num_rows, D, inner, stride_outer, stride_inner,
    HAS_RESIDUAL: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """total = x + residual if HAS_RESIDUAL, else x; y = rms_norm(total)."""
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_R
    row = (first_row + tl.arange(0, BLOCK_R))[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    mask = (row < num_rows) & (d < D)
    value = tl.load(x + row_offsets(first_row, inner, stride_outer, stride_inner, BLOCK_R) + d, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        whole = rounded(value + tl.load(residual + row * D + d, mask=mask, other=0.0).to(tl.float32), total.dtype.element_ty)
        tl.store(total + row * D + d, whole, mask=mask)
        value = whole.to(tl.float32)
    # The norm, in f32 but for the stored result.
    factor = tl.load(weight + d, mask=d < D, other=0.0)
    tl.store(y + row * D + d, rounded(value * row_scale(value, D, eps) * factor, y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows", "tiles_per_part"])
def rms_norm_bwd_kernel(
    dx,  # [num_rows, D], contiguous
    parts,  # f32[programs, D]: each program's sum of dweight
    dy,  # [num_rows, D] by its strides
    dtotal,  # like dx; dy again without HAS_TOTAL
    x,  # [num_rows, D] by its strides; the total of add_rms_norm
    weight,  # f32[D]
    eps, num_rows, tiles_per_part, D, inner_dy, outer_stride_dy, inner_stride_dy,
    inner, stride_outer, stride_inner, HAS_TOTAL: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """With s the row's scale and g = dy * weight: dx = s * (g - x * s^2 * mean(g * x)) (+ dtotal), and
    dweight sums dy * x * s."""
    d = tl.arange(0, BLOCK_D)[None, :]
    factor = tl.load(weight + d, mask=d < D, other=0.0)
    part = tl.program_id(0).to(tl.int64)
    dweight = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for tile in range(tiles_per_part):
        first_row = (part * tiles_per_part + tile) * BLOCK_R
        row = (first_row + tl.arange(0, BLOCK_R))[:, None]
        mask = (row < num_rows) & (d < D)
        # A tile of x and of its upstream gradient.
        from_x = row_offsets(first_row, inner, stride_outer, stride_inner, BLOCK_R) + d
        from_dy = row_offsets(first_row, inner_dy, outer_stride_dy, inner_stride_dy, BLOCK_R) + d
        value = tl.load(x + from_x, mask=mask, other=0.0).to(tl.float32)
        upstream = tl.load(dy + from_dy, mask=mask, other=0.0).to(tl.float32)
        # dx, and this tile's terms of dweight.
        scale = row_scale(value, D, eps)
        gradient = upstream * factor
        back = scale * scale * (tl.sum(gradient * value, axis=1)[:, None] / D)
        result = (gradient - value * back) * scale
        if HAS_TOTAL:
            result += tl.load(dtotal + row * D + d, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx + row * D + d, rounded(result, dx.dtype.element_ty), mask=mask)
        dweight += tl.where(mask, upstream * (value * scale), 0.0)  # rows past the end may have an infinite scale
    tl.store(parts + part * D + d, tl.sum(dweight, axis=0)[None, :], mask=d < D)


@triton.jit(do_not_specialize=["num_parts"])
def dweight_kernel(
    dweight,  # f32[D]
    parts,  # f32[num_parts, D]
    num_parts, D, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """dweight = the sum of parts over the programs, in order."""
    d = (tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    total = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    for first in range(0, num_parts, BLOCK_P):
        part = (first + tl.arange(0, BLOCK_P)).to(tl.int64)[:, None]
        total += tl.load(parts + part * D + d, mask=(part < num_parts) & (d < D), other=0.0)
    tl.store(dweight + d, tl.sum(total, axis=0)[None, :], mask=d < D)


PARTS_CONFIG = {"BLOCK_P": 256, "BLOCK_D": 16, "num_warps": 4}


def config(size: int) -> dict[str, int]:
    """Tile and warps, from the row size alone: 8 elements per thread, one vector load of bf16, and more only
    past 4096."""
    width = triton.next_power_of_2(size)
    return {"BLOCK_R": max(1, TILE // width), "BLOCK_D": width, "num_warps": min(16, max(4, width // 256))}


def _place(rows: torch.Tensor) -> tuple[int, int, int]:
    """rows [outer, D] or [outer, inner, D] -> (inner, stride of outer, stride of inner)."""
    return (rows.shape[1], rows.stride(0), rows.stride(1)) if rows.dim() == 3 else (1, rows.stride(0), 0)


def _forward(
    y: torch.Tensor, total: torch.Tensor, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float,
    has_residual: bool,
) -> None:
    if not y.numel():
        return
    size = weight.shape[0]
    num_rows, chosen = x.numel() // size, config(size)
    rms_norm_fwd_kernel[(triton.cdiv(num_rows, chosen["BLOCK_R"]),)](
        y, total, x, residual, weight, eps, num_rows, size, *_place(x), HAS_RESIDUAL=has_residual, **chosen)


def _backward(
    dx: torch.Tensor, dweight: torch.Tensor, dy: torch.Tensor, dtotal: torch.Tensor | None, x: torch.Tensor, weight: torch.Tensor,
    eps: float,
) -> None:
    size = weight.shape[0]
    if not x.numel():
        dweight.zero_()
        return
    num_rows, chosen = x.numel() // size, config(size)
    num_tiles = triton.cdiv(num_rows, chosen["BLOCK_R"])
    tiles_per_part = triton.cdiv(num_tiles, MAX_PARTS)
    num_parts = triton.cdiv(num_tiles, tiles_per_part)
    parts = torch.empty(num_parts, size, dtype=torch.float32, device=x.device)
    rms_norm_bwd_kernel[(num_parts,)](
        dx, parts, dy, dy if dtotal is None else dtotal, x, weight, eps, num_rows, tiles_per_part, size, *_place(dy), *_place(x),
        HAS_TOTAL=dtotal is not None, **chosen)
    dweight_kernel[(triton.cdiv(size, PARTS_CONFIG["BLOCK_D"]),)](dweight, parts, num_parts, size, **PARTS_CONFIG)


def rms_norm_fwd(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
    _forward(y, y, x, x, weight, eps, has_residual=False)


def rms_norm_bwd(
    dx: torch.Tensor, dweight: torch.Tensor, dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float
) -> None:
    _backward(dx, dweight, dy, None, x, weight, eps)


def add_rms_norm_fwd(
    y: torch.Tensor, total: torch.Tensor, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> None:
    size = weight.shape[0]
    _forward(y, total, x.view(-1, size), residual, weight, eps, has_residual=True)


def add_rms_norm_bwd(
    dx: torch.Tensor, dweight: torch.Tensor, dy: torch.Tensor, dtotal: torch.Tensor | None, total: torch.Tensor,
    weight: torch.Tensor, eps: float,
) -> None:
    size = weight.shape[0]
    _backward(dx, dweight, dy.view(-1, size), dtotal, total.view(-1, size), weight, eps)


def compiles() -> list[Compile]:
    found: list[Compile] = []
    for dtype in DTYPES:
        p = pointer(dtype)
        place = {"inner": 1, "stride_outer": "i32", "stride_inner": "i32"}
        place_dy = {"inner_dy": 1, "outer_stride_dy": "i32", "inner_stride_dy": "i32"}
        heads = place | {"inner": "i32"}, place_dy | {"inner_dy": "i32"}
        # Heads of the default model and of most models; hidden states of both, and of wide models.
        for size, has_residual in ((32, False), (128, True), (2048, True), (8192, True)):
            of_x, of_dy = (place, place_dy) if has_residual else heads
            forward: dict[str, Any] = {"y": p, "total": p, "x": p, "residual": p, "weight": "*fp32", "eps": "fp32",
                                       "num_rows": "i32", "D": "i32", **of_x}
            backward: dict[str, Any] = {"dx": p, "parts": "*fp32", "dy": p, "dtotal": p, "x": p, "weight": "*fp32",
                                        "eps": "fp32", "num_rows": "i32", "tiles_per_part": "i32", "D": "i32", **of_dy, **of_x}
            options, flag = config(size) | {"num_stages": 3}, has_residual
            may_spill = dtype == torch.float32 and size == 8192  # backward on sm_100: a row of this size fills the registers
            name = "add_rms_norm" if has_residual else "rms_norm"
            found += [Compile(f"{name}_fwd D{size}", dtype, rms_norm_fwd_kernel, forward, options | {"HAS_RESIDUAL": flag}),
                      Compile(f"{name}_bwd D{size}", dtype, rms_norm_bwd_kernel, backward, options | {"HAS_TOTAL": flag},
                              may_spill=may_spill)]
    arguments = {"dweight": "*fp32", "parts": "*fp32", "num_parts": "i32", "D": "i32"}
    return [*found, Compile("rms_norm_dweight", torch.float32, dweight_kernel, arguments, PARTS_CONFIG | {"num_stages": 3})]
