"""The experts on a GPU: grouped products over rows sorted by expert (triton_plan.py).

    forward   act = swiglu(x[token] @ gate_up_e^T)      one kernel: rounds gate_up, saves it, applies swiglu
              out = act @ down_e^T                      y[t] = sum_c weights[t, c] * out[row of (t, c)]
    backward  dact = dy[token] @ down_e                 dp = swiglu'(gate_up, weight * dact)
                                                        dweights = act . dact
              ddown_e = dy[token]^T @ (weight * act)    dgate_up_e = dp^T @ x[token], both over the expert's
                                                        rows in order
              dx_rows = dp @ gate_up_e                  dx[t] = sum over c, in f32

A program of a product computes one tile of the result: BLOCK_M rows of one expert by BLOCK_N columns. In bf16
BLOCK_M is 128 for any number of rows, in training and decoding (on sm_90 fewer than 64 rows would compile to
another instruction, with another order of sums). It walks the inner dimension first to last, without split or
atomics, so a row's bits follow from its values and its expert. Loads gather rows by token, without a copy;
sums over rows are split by expert alone.

In bf16 a tile is 128 x 256 (gate_up: two accumulators of 128 x 128): 128 registers per thread with 8 warps,
48 KB of shared memory per stage. Flops: 6TkDI forward, 12TkDI backward. Bytes moved besides operands and
results: 4TkI + 3TkD forward, 12TkI + 3TkD backward, times itemsize. swiglu's backward is a separate kernel:
its six tiles do not fit in registers next to an accumulator.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from kernels.ahead_of_time import Compile, pointer
from kernels.moe import triton_plan, triton_route
from kernels.moe.triton_plan import Plan, make_plan
from kernels.moe.triton_route import moe_route_bwd, moe_route_fwd
from kernels.swiglu.triton_kernel import swiglu_gradient, swiglu_value
from kernels.triton_math import INTERPRETED, grouped_tile, rounded
from kernels.triton_ops import DTYPES

__all__ = ["compiles", "moe_experts_bwd", "moe_experts_fwd", "moe_route_bwd", "moe_route_fwd"]
GROUP_M = 8
"""Row tiles that share a column of weight tiles in L2."""


@triton.jit
def load_operand(pointers, mask):
    """A tile for tl.dot. Triton's interpreter cannot multiply bf16, so it gets f32."""
    tile = tl.load(pointers, mask=mask, other=0.0)
    if INTERPRETED:
        tile = tile.to(tl.float32)
    return tile


@triton.jit(do_not_specialize=["num_tiles"])
def gate_up_kernel(
    act,  # [T * k, INNER], rows sorted by expert
    kept,  # [T * k, 2 * INNER] with KEEP
    x,  # [T, D]
    weight,  # [E, 2 * INNER, D]
    pairs,  # i32[T * k]
    tiles,  # i32[3, num_tiles]
    num_tiles, D, INNER, CHOICES: tl.constexpr, KEEP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):
    """kept = x[token] @ weight[expert]^T, act = swiglu(kept)."""
    tile_m, tile_n = grouped_tile(tl.program_id(0), num_tiles, tl.cdiv(INNER, BLOCK_N), GROUP_M)
    expert = tl.load(tiles + tile_m).to(tl.int64)
    if expert < 0:
        return
    row = tl.load(tiles + num_tiles + tile_m).to(tl.int64) + tl.arange(0, BLOCK_M)
    is_row = row < tl.load(tiles + 2 * num_tiles + tile_m)
    token = tl.load(pairs + row, mask=is_row, other=0) // CHOICES
    n = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    x_rows = x + token.to(tl.int64)[:, None] * D
    columns = weight + expert * 2 * INNER * D + n[None, :] * D
    up_columns = weight + (expert * 2 + 1) * INNER * D + n[None, :] * D
    # Both halves of the product.
    gate, up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32), tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, D, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x_tile = load_operand(x_rows + k[None, :], is_row[:, None] & (k[None, :] < D))
        mask = (n[None, :] < INNER) & (k[:, None] < D)
        gate = tl.dot(x_tile, load_operand(columns + k[:, None], mask), gate, input_precision="ieee")
        up = tl.dot(x_tile, load_operand(up_columns + k[:, None], mask), up, input_precision="ieee")
    # Rounded, saved, and swiglu of the rounded values.
    dtype = act.dtype.element_ty
    gate_rounded, up_rounded = rounded(gate, dtype), rounded(up, dtype)
    mask = is_row[:, None] & (n[None, :] < INNER)
    if KEEP:
        place = kept + row[:, None] * 2 * INNER + n[None, :]
        tl.store(place, gate_rounded, mask=mask)
        tl.store(place + INNER, up_rounded, mask=mask)
    value = swiglu_value(gate_rounded.to(tl.float32), up_rounded.to(tl.float32))
    tl.store(act + row[:, None] * INNER + n[None, :], rounded(value, dtype), mask=mask)


@triton.jit(do_not_specialize=["num_tiles"])
def rows_kernel(
    out,  # [rows, N]
    a,  # [rows, K]; with CHOICES [T, K], read by the row's token
    weight,  # [E, K, N], by its strides
    pairs,  # i32[T * k]
    tiles,  # i32[3, num_tiles]
    num_tiles, N, K, stride_we, stride_wk, stride_wn, CHOICES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):
    """out = a @ weight[expert]."""
    tile_m, tile_n = grouped_tile(tl.program_id(0), num_tiles, tl.cdiv(N, BLOCK_N), GROUP_M)
    expert = tl.load(tiles + tile_m).to(tl.int64)
    if expert < 0:
        return
    row = tl.load(tiles + num_tiles + tile_m).to(tl.int64) + tl.arange(0, BLOCK_M)
    is_row = row < tl.load(tiles + 2 * num_tiles + tile_m)
    n = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    # The product, over rows that are gathered by token if CHOICES.
    source = row
    if CHOICES > 0:
        source = (tl.load(pairs + row, mask=is_row, other=0) // CHOICES).to(tl.int64)
    a_rows = a + source[:, None] * K
    columns = weight + expert * stride_we + n[None, :] * stride_wn
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K).to(tl.int64)
        a_tile = load_operand(a_rows + k[None, :], is_row[:, None] & (k[None, :] < K))
        w_tile = load_operand(columns + k[:, None] * stride_wk, (n[None, :] < N) & (k[:, None] < K))
        total = tl.dot(a_tile, w_tile, total, input_precision="ieee")
    mask = is_row[:, None] & (n[None, :] < N)
    tl.store(out + row[:, None] * N + n[None, :], rounded(total, out.dtype.element_ty), mask=mask)


@triton.jit
def wgrad_kernel(
    dweight,  # [E, M, N]
    left,  # [rows, M], or [T, M] with GATHER_LEFT
    right,  # [T, N], or [rows, N] with GATHER_LEFT
    pairs,  # i32[T * k]
    bounds,  # i32[E + 1]
    M, N, CHOICES: tl.constexpr, GATHER_LEFT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):
    """dweight[e] = left^T @ right over the rows of expert e, in order."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    expert = tl.program_id(0) // (tiles_m * tiles_n)
    tile_m, tile_n = grouped_tile(tl.program_id(0) % (tiles_m * tiles_n), tiles_m, tiles_n, GROUP_M)
    m, n = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # The sum over the rows of the expert.
    end = tl.load(bounds + expert + 1)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(tl.load(bounds + expert), end, BLOCK_K):
        row = start + tl.arange(0, BLOCK_K)
        is_row = row < end
        token = (tl.load(pairs + row, mask=is_row, other=0) // CHOICES).to(tl.int64)
        row = row.to(tl.int64)
        left_row, right_row = token if GATHER_LEFT else row, row if GATHER_LEFT else token
        left_tile = load_operand(left + left_row[None, :] * M + m[:, None], (m[:, None] < M) & is_row[None, :])
        right_tile = load_operand(right + right_row[:, None] * N + n[None, :], is_row[:, None] & (n[None, :] < N))
        total = tl.dot(left_tile, right_tile, total, input_precision="ieee")
    place = dweight + expert.to(tl.int64) * M * N + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(place, rounded(total, dweight.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))


@triton.jit(do_not_specialize=["num_pairs"])
def act_bwd_kernel(
    dp,  # [rows, 2 * INNER]
    weighted,  # [rows, INNER]
    dweights,  # f32[T * k]
    dact,  # [rows, INNER]
    kept,  # [rows, 2 * INNER]
    weights,  # f32[T * k]
    rows,  # i32[T * k]
    num_pairs, INNER, BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr,
):
    """For each pair: dp = swiglu'(kept, weight * dact), weighted = weight * act, dweights = act . dact."""
    pair = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    row = tl.load(rows + pair, mask=pair < num_pairs, other=-1).to(tl.int64)[:, None]
    weight = tl.load(weights + pair, mask=pair < num_pairs, other=0.0)[:, None]
    dot = tl.zeros((BLOCK_R, BLOCK_I), tl.float32)
    # A tile of columns at a time.
    for start in range(0, INNER, BLOCK_I):
        i = (start + tl.arange(0, BLOCK_I))[None, :]
        mask = (row >= 0) & (i < INNER)
        place = row * 2 * INNER + i
        gate = tl.load(kept + place, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(kept + place + INNER, mask=mask, other=0.0).to(tl.float32)
        upstream = tl.load(dact + row * INNER + i, mask=mask, other=0.0).to(tl.float32)
        act = rounded(swiglu_value(gate, up), kept.dtype.element_ty).to(tl.float32)  # the same bits as in the forward pass
        dot += act * upstream
        tl.store(weighted + row * INNER + i, rounded(act * weight, weighted.dtype.element_ty), mask=mask)
        dgate, dup = swiglu_gradient(gate, up, upstream * weight)
        tl.store(dp + place, rounded(dgate, dp.dtype.element_ty), mask=mask)
        tl.store(dp + place + INNER, rounded(dup, dp.dtype.element_ty), mask=mask)
    dweight = tl.where(row >= 0, tl.sum(dot, axis=1)[:, None], float("nan"))
    tl.store(dweights + pair[:, None], dweight, mask=pair[:, None] < num_pairs)


@triton.jit(do_not_specialize=["T"])
def combine_kernel(
    y,  # [T, D]
    values,  # [rows, D]
    weights,  # f32[T, CHOICES]; not read without HAS_WEIGHTS
    rows,  # i32[T, CHOICES]
    T, D, CHOICES: tl.constexpr, HAS_WEIGHTS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """y[t] = the sum over its choices, in order, of values[row], times the choice's weight with
    HAS_WEIGHTS."""
    t = (tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]
    d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    mask = (t < T) & (d < D)
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for choice in tl.static_range(CHOICES):
        row = tl.load(rows + t * CHOICES + choice, mask=t < T, other=-1).to(tl.int64)
        value = tl.load(values + row * D + d, mask=mask & (row >= 0), other=float("nan")).to(tl.float32)
        if HAS_WEIGHTS:
            value *= tl.load(weights + t * CHOICES + choice, mask=t < T, other=0.0)
        total += value
    tl.store(y + t * D + d, rounded(total, y.dtype.element_ty), mask=mask)


def config(kernel: Any, dtype: torch.dtype) -> dict[str, int]:
    """Tile and launch options of a product, from the kernel and its operands' dtype alone."""
    if dtype == torch.bfloat16:
        width = 256 if kernel in (rows_kernel, wgrad_kernel) else 128
        return {"BLOCK_M": 128, "BLOCK_N": width, "BLOCK_K": 64, "GROUP_M": GROUP_M, "num_warps": 8, "num_stages": 3}
    width = 32 if kernel is gate_up_kernel else 64
    return {"BLOCK_M": 64, "BLOCK_N": width, "BLOCK_K": 32, "GROUP_M": GROUP_M, "num_warps": 4, "num_stages": 3}


def row_config(size: int) -> dict[str, int]:
    """Tile of the elementwise kernels, from the row size alone: 1024 elements, 8 per thread, as wide as a row
    up to that."""
    width = min(triton.next_power_of_2(size), 1024)
    return {"rows": 1024 // width, "width": width}


def _rows(out: torch.Tensor, a: torch.Tensor, weight: torch.Tensor, plan: Plan, choices: int = 0) -> None:
    """out [rows, N] = a [rows, K] @ weight[expert], weight [E, K, N] of any strides. With choices, a is [T,
    K] and read by token."""
    chosen, num_tiles = config(rows_kernel, a.dtype), plan.tiles.shape[1]
    rows_kernel[(num_tiles * triton.cdiv(out.shape[1], chosen["BLOCK_N"]),)](
        out, a, weight, plan.pairs, plan.tiles, num_tiles, out.shape[1], a.shape[1], *weight.stride(), CHOICES=choices, **chosen)


def _wgrad(
    dweight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, plan: Plan, choices: int, gather_left: bool
) -> None:
    chosen, (num_experts, m, n) = config(wgrad_kernel, left.dtype), dweight.shape
    grid = (num_experts * triton.cdiv(m, chosen["BLOCK_M"]) * triton.cdiv(n, chosen["BLOCK_N"]),)
    wgrad_kernel[grid](dweight, left, right, plan.pairs, plan.bounds, m, n, CHOICES=choices, GATHER_LEFT=gather_left, **chosen)


def _combine(y: torch.Tensor, values: torch.Tensor, weights: torch.Tensor | None, plan: Plan, choices: int) -> None:
    (num_tokens, hidden), chosen = y.shape, row_config(y.shape[1])
    combine_kernel[(triton.cdiv(num_tokens, chosen["rows"]), triton.cdiv(hidden, chosen["width"]))](
        y, values, y if weights is None else weights, plan.rows, num_tokens, hidden, CHOICES=choices,
        HAS_WEIGHTS=weights is not None, BLOCK_T=chosen["rows"], BLOCK_D=chosen["width"], num_warps=4)


def _plan(expert_ids: torch.Tensor, num_experts: int, dtype: torch.dtype) -> Plan:
    return make_plan(expert_ids, num_experts, config(rows_kernel, dtype)["BLOCK_M"])


def moe_experts_fwd(
    y: torch.Tensor, kept: torch.Tensor, x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, expert_ids: torch.Tensor,
    weights: torch.Tensor,
) -> None:
    if not y.numel() or not expert_ids.numel():
        y.zero_()
        return
    (num_experts, hidden, inner), (num_rows, choices) = down.shape, (expert_ids.numel(), expert_ids.shape[1])
    plan, chosen = _plan(expert_ids, num_experts, x.dtype), config(gate_up_kernel, x.dtype)
    num_tiles, keeps = plan.tiles.shape[1], kept.numel() > 0
    act, out = x.new_empty(num_rows, inner), x.new_empty(num_rows, hidden)
    gate_up_kernel[(num_tiles * triton.cdiv(inner, chosen["BLOCK_N"]),)](
        act, kept if keeps else act, x, gate_up.to(x.dtype), plan.pairs, plan.tiles, num_tiles, hidden, inner, CHOICES=choices,
        KEEP=keeps, **chosen)
    _rows(out, act, down.to(x.dtype).transpose(1, 2), plan)
    _combine(y, out, weights, plan, choices)


def moe_experts_bwd(
    dx: torch.Tensor, dgate_up: torch.Tensor, ddown: torch.Tensor, dweights: torch.Tensor, dy: torch.Tensor, kept: torch.Tensor,
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor,
) -> None:
    if not x.numel() or not expert_ids.numel():
        for gradient in (dx, dgate_up, ddown, dweights):
            gradient.zero_()
        return
    (num_experts, hidden, inner), (num_rows, choices) = down.shape, (expert_ids.numel(), expert_ids.shape[1])
    # dact, then swiglu backward.
    plan, chosen = _plan(expert_ids, num_experts, x.dtype), row_config(inner)
    dact, weighted, dp = x.new_empty(num_rows, inner), x.new_empty(num_rows, inner), torch.empty_like(kept)
    _rows(dact, dy, down.to(x.dtype), plan, choices)
    act_bwd_kernel[(triton.cdiv(num_rows, chosen["rows"]),)](
        dp, weighted, dweights, dact, kept, weights, plan.rows, num_rows, inner, BLOCK_R=chosen["rows"], BLOCK_I=chosen["width"],
        num_warps=4)
    # The gradients of the weights and of x.
    _wgrad(ddown, dy, weighted, plan, choices, gather_left=True)
    _wgrad(dgate_up, dp, x, plan, choices, gather_left=False)
    dx_rows = x.new_empty(num_rows, hidden)
    _rows(dx_rows, dp, gate_up.to(x.dtype), plan)
    _combine(dx, dx_rows, None, plan, choices)


def _products(dtype: torch.dtype) -> list[Compile]:
    p, i = pointer(dtype), "*i32"
    plan = {"pairs": i, "tiles": i, "num_tiles": "i32"}
    products: list[tuple[str, Any, dict[str, Any], dict[str, Any]]] = [
        ("moe_gate_up", gate_up_kernel, dict.fromkeys(("act", "kept", "x", "weight"), p) | plan | {"D": "i32", "INNER": "i32"},
         {"CHOICES": 8, "KEEP": True})]
    for name, one, choices in (("moe_down", "stride_wk", 0), ("moe_dact", "stride_wn", 8), ("moe_dx", "stride_wn", 0)):
        strides = dict.fromkeys(("stride_we", "stride_wk", "stride_wn"), "i32") | {one: 1}
        products.append((name, rows_kernel, {"out": p, "a": p, "weight": p, **plan, "N": "i32", "K": "i32", **strides},
                      {"CHOICES": choices}))
    for name, gathers_left in (("moe_ddown", True), ("moe_dgate_up", False)):
        products.append((name, wgrad_kernel, {"dweight": "*fp32", "left": p, "right": p, "pairs": i, "bounds": i, "M": "i32",
                                           "N": "i32"}, {"CHOICES": 8, "GATHER_LEFT": gathers_left}))
    return [Compile(name, dtype, kernel, arguments, config(kernel, dtype) | constants, is_matrix_product=True,
                    may_spill=True)  # on sm_80 and sm_100 only: the tiles fit the registers of sm_90
            for name, kernel, arguments, constants in products]


def _passes(dtype: torch.dtype, inner_size: int, hidden_size: int) -> list[Compile]:
    p, launch = pointer(dtype), {"num_warps": 4, "num_stages": 3}
    inner, hidden = row_config(inner_size), row_config(hidden_size)
    return [
        Compile(f"moe_act_bwd I{inner_size}", dtype, act_bwd_kernel,
                {"dp": p, "weighted": p, "dweights": "*fp32", "dact": p, "kept": p, "weights": "*fp32", "rows": "*i32",
                 "num_pairs": "i32", "INNER": "i32"}, launch | {"BLOCK_R": inner["rows"], "BLOCK_I": inner["width"]}),
        *(Compile(f"moe_combine{'' if has_weights else '_bwd'} D{hidden_size}", dtype, combine_kernel,
                  {"y": p, "values": p, "weights": "*fp32", "rows": "*i32", "T": "i32", "D": "i32"},
                  launch | {"CHOICES": 8, "HAS_WEIGHTS": has_weights, "BLOCK_T": hidden["rows"], "BLOCK_D": hidden["width"]})
          for has_weights in (True, False))]


def compiles() -> list[Compile]:
    """bf16 for a large model, f32 for the default model. In f32 dact and dgate_up have the same
    specialisations as dx and ddown."""
    bf16, f32 = DTYPES[1], DTYPES[0]
    small = [what for what in _products(f32) if what.name not in ("moe_dact", "moe_dgate_up")]
    return [*triton_route.compiles(), *triton_plan.compiles(), *small, *_products(bf16), *_passes(f32, 96, 128),
            *_passes(bf16, 768, 2048)]
