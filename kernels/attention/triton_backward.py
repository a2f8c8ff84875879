"""Attention's gradients on a GPU: two passes over the query-key pairs, without atomics.

    P = exp(score - highest) / total      dS = P * (dout v^T - delta)      delta = sum(dout * out)
    dq = scale * dS k                     dk = scale * dS^T q              dv = P^T dout

A program of attention_bwd_query_kernel has a tile of query rows and walks the keys as in the forward pass:
dq, and delta for the second pass. A program of attention_bwd_key_kernel has a tile of keys and walks its
readers in the pack's order: for a shared prefix, all completions of the group. If they are very many
(tiles.py), several programs divide them, and attention_bwd_merge_kernel adds the parts in order. This takes
14 flops per pair and column. One pass would take 10, but would have to add dq over programs. Bytes moved: the
first pass as forward, plus dout; the second reads q and dout once per BLOCK_N keys that they see, from L2,
and moves 16 * C bytes per part and key. C 128 in bf16 on sm_90: 247 and 255 registers for each of 256
threads, 160 and 129 KB, so one program per multiprocessor.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.attention.tiles import forward_config, key_config, query_config
from kernels.attention.triton_forward import NEVER, log2_scale, row_offsets, stat_offset
from kernels.triton_ops import IS_INTERPRETED


@triton.jit(do_not_specialize=["tiles", "num_tokens"])
def attention_bwd_query_kernel(
    dq,  # [T, H, C]
    delta,  # f32[K, T, R]
    dout,  # [T, H, C]
    out,  # [T, H, C]
    stats,  # f32[K, T, R, 2]
    q,  # [T, H, C]
    k,  # [T, K, C]
    v,  # [T, K, C]
    tiles,  # i32[N, 5]
    num_tokens, scale, dq_scale,
    K: tl.constexpr, R: tl.constexpr, C: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, UPCAST: tl.constexpr,
):
    """BLOCK_M of the SPLIT * BLOCK_M rows of a tile: dq and delta."""
    # The tile and its rows.
    tile, kv_head = tiles + tl.program_id(0) // SPLIT * 5, tl.program_id(1)
    start, length, prefix_start, prefix_length = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    first_row = tl.load(tile + 4) + tl.program_id(0) % SPLIT * BLOCK_M
    m, n, c = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_C)
    is_row = first_row + m < length * R
    row_mask = is_row[:, None] & (c[None, :] < C)
    row_start, row_steps = row_offsets(start, first_row, m, kv_head, K, R, C)
    at_row = row_steps[:, None] + c[None, :]
    rows = tl.load(q + row_start + at_row, mask=row_mask, other=0.0)
    drows = tl.load(dout + row_start + at_row, mask=row_mask, other=0.0)
    if UPCAST:
        rows, drows = rows.to(tl.float32), drows.to(tl.float32)
    # delta, and the rows' softmax statistics.
    row_delta = tl.sum(tl.load(out + row_start + at_row, mask=row_mask, other=0.0).to(tl.float32) * drows.to(tl.float32), 1)
    at_stat = stat_offset(start, first_row, kv_head, num_tokens, R) + m
    top = tl.load(stats + at_stat * 2, mask=is_row, other=0.0)
    total = tl.load(stats + at_stat * 2 + 1, mask=is_row, other=1.0)
    share = 1.0 / total
    tl.store(delta + at_stat, row_delta, mask=is_row)
    # The prefix's tiles of keys, then the segment's.
    limits = (first_row + m) // R
    sums = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    at_key = n[:, None] * (K * C) + c[None, :]
    num_prefix = tl.cdiv(prefix_length, BLOCK_N)
    num_own = tl.cdiv(tl.minimum((first_row + BLOCK_M - 1) // R + 1, length), BLOCK_N)
    for step in range(num_prefix + num_own):
        is_own = step >= num_prefix
        first = tl.where(is_own, step - num_prefix, step) * BLOCK_N
        is_key = n < tl.where(is_own, length, prefix_length) - first
        places = tl.where(is_key, tl.where(is_own, first + n, 0), NEVER)
        token = tl.where(is_own, start, prefix_start).to(tl.int64) + first
        key_start, key_mask = (token * K + kv_head) * C, is_key[:, None] & (c[None, :] < C)
        keys = tl.load(k + key_start + at_key, mask=key_mask, other=0.0)
        values = tl.load(v + key_start + at_key, mask=key_mask, other=0.0)
        if UPCAST:
            keys, values = keys.to(tl.float32), values.to(tl.float32)
        scores = tl.dot(rows, tl.trans(keys), input_precision="ieee")
        weights = tl.exp2(tl.fma(scores, scale, -top[:, None])) * share[:, None]
        dweights = tl.dot(drows, tl.trans(values), input_precision="ieee")
        dscores = tl.where(places[None, :] <= limits[:, None], weights * (dweights - row_delta[:, None]), 0.0)
        sums = tl.dot(dscores.to(keys.dtype), keys, sums, input_precision="ieee")
    tl.store(dq + row_start + at_row, (sums * dq_scale).to(dq.dtype.element_ty), mask=row_mask)


@triton.jit(do_not_specialize=["parts", "wholes", "readers", "num_tokens", "num_parts"])
def attention_bwd_key_kernel(
    dk,  # [T, K, C]
    dv,  # [T, K, C]
    part_sums,  # f32[P, K, 2, BLOCK_N, BLOCK_C]
    dout,  # [T, H, C]
    stats,  # f32[K, T, R, 2]
    delta,  # f32[K, T, R]
    q,  # [T, H, C]
    k,  # [T, K, C]
    v,  # [T, K, C]
    parts,  # i32[P, 4]
    wholes,  # i32[U, 4]
    readers,  # i32[Q, 6]
    num_tokens, num_parts, scale, dk_scale,
    K: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, UPCAST: tl.constexpr,
):
    """dk and dv of a tile of keys over all of its readers; or over a part of them, written to part_sums."""
    # The tile of keys.
    unit, kv_head = tl.program_id(0), tl.program_id(1)
    is_part = unit < num_parts
    record = tl.where(is_part, parts + unit * 4, wholes + (unit - num_parts) * 4)
    key_start, num_keys = tl.load(record), tl.load(record + 1)
    m, n, c = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_C)
    is_key = n < num_keys
    key_mask = is_key[:, None] & (c[None, :] < C)
    first_key, at_key = (key_start.to(tl.int64) * K + kv_head) * C, n[:, None] * (K * C) + c[None, :]
    keys = tl.load(k + first_key + at_key, mask=key_mask, other=0.0)
    values = tl.load(v + first_key + at_key, mask=key_mask, other=0.0)
    if UPCAST:
        keys, values = keys.to(tl.float32), values.to(tl.float32)
    # Each reader's tiles of query rows, in order.
    key_sums = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    value_sums = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for number in range(tl.load(record + 2), tl.load(record + 3)):
        reader = readers + number * 6
        start, length = tl.load(reader), tl.load(reader + 1)
        place = key_start + n
        is_seen = is_key & (place >= tl.load(reader + 4)) & (place < tl.load(reader + 5))
        places = tl.where(is_seen, place, NEVER)
        for step in range(tl.load(reader + 2), tl.load(reader + 3)):
            first_row = step * BLOCK_M
            is_row = first_row + m < length * R
            row_mask = is_row[:, None] & (c[None, :] < C)
            row_start, row_steps = row_offsets(start, first_row, m, kv_head, K, R, C)
            at_row = row_steps[:, None] + c[None, :]
            rows = tl.load(q + row_start + at_row, mask=row_mask, other=0.0)
            drows = tl.load(dout + row_start + at_row, mask=row_mask, other=0.0)
            if UPCAST:
                rows, drows = rows.to(tl.float32), drows.to(tl.float32)
            limits = tl.where(is_row, start + (first_row + m) // R, -1)
            scores = tl.dot(keys, tl.trans(rows), input_precision="ieee")  # [N, M], like the other products
            at_stat = stat_offset(start, first_row, kv_head, num_tokens, R) + m
            top = tl.load(stats + at_stat * 2, mask=is_row, other=0.0)
            total = tl.load(stats + at_stat * 2 + 1, mask=is_row, other=1.0)
            row_delta = tl.load(delta + at_stat, mask=is_row, other=0.0)
            if q.dtype.element_ty == tl.float32:
                weights = tl.exp2(tl.fma(scores, scale, -top[None, :])) / total[None, :]
            else:  # one number per row saves registers; its rounding is far below that of the bf16 weights
                weights = tl.exp2(tl.fma(scores, scale, -(top + tl.log2(total))[None, :]))
            weights = tl.where(places[:, None] <= limits[None, :], weights, 0.0)
            value_sums = tl.dot(weights.to(drows.dtype), drows, value_sums, input_precision="ieee")
            dweights = tl.dot(values, tl.trans(drows), input_precision="ieee")
            dscores = weights * (dweights - row_delta[None, :])
            key_sums = tl.dot(dscores.to(rows.dtype), rows, key_sums, input_precision="ieee")
    # Stored, or left for the merge kernel.
    key_sums *= dk_scale
    if is_part:
        at = part_sums + (unit.to(tl.int64) * K + kv_head) * (2 * BLOCK_N * BLOCK_C) + n[:, None] * BLOCK_C + c[None, :]
        tl.store(at, key_sums)
        tl.store(at + BLOCK_N * BLOCK_C, value_sums)
    else:
        tl.store(dk + first_key + at_key, key_sums.to(dk.dtype.element_ty), mask=key_mask)
        tl.store(dv + first_key + at_key, value_sums.to(dv.dtype.element_ty), mask=key_mask)


@triton.jit(do_not_specialize=["merges"])
def attention_bwd_merge_kernel(
    dk,  # [T, K, C]
    dv,  # [T, K, C]
    part_sums,  # f32[P, K, 2, BLOCK_N, BLOCK_C]
    merges,  # i32[M, 4]
    K: tl.constexpr, C: tl.constexpr, STRIP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """dk or dv of STRIP keys of a tile that was split: adds its parts in order."""
    merge, kv_head, which = merges + tl.program_id(0) * 4, tl.program_id(1), tl.program_id(2) % 2
    n, c = tl.program_id(2) // 2 * STRIP + tl.arange(0, STRIP), tl.arange(0, BLOCK_C)
    sums = tl.zeros((STRIP, BLOCK_C), tl.float32)
    for part in range(tl.load(merge + 2), tl.load(merge + 3)):
        at = ((tl.cast(part, tl.int64) * K + kv_head) * 2 + which) * BLOCK_N
        sums += tl.load(part_sums + (at + n[:, None]) * BLOCK_C + c[None, :])
    to = tl.where(which == 0, dk, dv)
    at_key = ((tl.load(merge).to(tl.int64) + n[:, None]) * K + kv_head) * C + c[None, :]
    tl.store(to + at_key, sums.to(to.dtype.element_ty), mask=(n[:, None] < tl.load(merge + 1)) & (c[None, :] < C))


def attention_bwd(
    dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, dout: torch.Tensor, out: torch.Tensor, stats: torch.Tensor,
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tiles: torch.Tensor, parts: torch.Tensor, wholes: torch.Tensor,
    readers: torch.Tensor, merges: torch.Tensor, scale: float,
) -> None:
    if not len(tiles):
        return
    # A negative scale moves its sign to q, so that the log2 scale is positive.
    dq_scale = scale
    if scale < 0:
        q, scale = -q, -scale  # dk = scale * dS^T q is unchanged
    # Over queries: dq and delta.
    (num_tokens, num_heads, head_dim), num_kv_heads = q.shape, k.shape[1]
    shape = {"K": num_kv_heads, "R": num_heads // num_kv_heads, "C": head_dim, "UPCAST": IS_INTERPRETED}
    delta = torch.empty(num_kv_heads, num_tokens, shape["R"], dtype=torch.float32, device=q.device)
    config = query_config(head_dim, q.dtype)
    split = forward_config(head_dim, q.dtype)["BLOCK_M"] // config["BLOCK_M"]
    attention_bwd_query_kernel[len(tiles) * split, num_kv_heads](
        dq, delta, dout, out, stats, q, k, v, tiles, num_tokens, log2_scale(scale), dq_scale, **shape, SPLIT=split, **config)
    # Over keys: dk and dv, then the parts of split tiles.
    config = key_config(head_dim, q.dtype)
    block_keys, columns = config["BLOCK_N"], config["BLOCK_C"]
    sums = torch.empty(len(parts), num_kv_heads, 2, block_keys, columns, dtype=torch.float32, device=q.device)
    attention_bwd_key_kernel[len(parts) + len(wholes), num_kv_heads](
        dk, dv, sums, dout, stats, delta, q, k, v, parts, wholes, readers, num_tokens, len(parts), log2_scale(scale), scale,
        **shape, **config)
    if len(merges):
        strip = min(block_keys, 32)
        attention_bwd_merge_kernel[len(merges), num_kv_heads, 2 * block_keys // strip](
            dk, dv, sums, merges, K=num_kv_heads, C=head_dim, STRIP=strip, BLOCK_N=block_keys, BLOCK_C=columns, num_warps=4)
