"""Attention on a GPU, forward: over a pack of segments, and over a paged cache. triton_backward.py has the
gradients.

Both call `attend`, which adds one tile of keys to the running sums of some query rows: the prefix's tiles
first, then the own keys', each in tiles of BLOCK_N counted from its start. A masked key has weight exactly 0,
and a tile that a row does not see changes none of its bits. So a row's bits follow from its keys alone:
packed or decoded, in any batch. Keys are not split over programs, since training would have to keep the sums
of two parts in registers to merge them equally. The cost: a long prompt with few groups decodes on only as
many multiprocessors as it has kv heads and tiles of rows.

A row is one head of one token. The R = H / K heads that share keys are adjacent rows, so that a tile of rows
fills the matrix units even if a sequence has one token. Bytes moved by a packed forward pass: q and out once;
k and v once per BLOCK_M rows that see them, from L2: 128 flops per byte at BLOCK_M 128. Decode reads a
group's prompt once for BLOCK_M / R of its sequences and own keys once, and stores the sums over a prompt (C +
2 f32 per row) in memory. C 128 in bf16 on sm_90: 213 registers for each of 256 threads and 128 KB, so one
program per multiprocessor, with two warpgroups of 64 rows each; decode up to 254 registers for each of 128
threads and 80 KB, so two programs.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl

from kernels.attention.plan import BLOCK_SIZE
from kernels.attention.tiles import forward_config, paged_config
from kernels.triton_ops import IS_INTERPRETED

PAGE = tl.constexpr(BLOCK_SIZE)
NEVER = tl.constexpr(2**31 - 1)
"""The position of a key that no row sees."""
LOWEST = tl.constexpr(-1e30)
"""A row's highest score before its first key; finite, so that no difference of two is NaN."""


@triton.jit
def attend(
    q,  # [M, C]
    k,  # [N, C]
    v,  # [N, C]
    places,  # i32[N]
    limits,  # i32[M]
    top,  # f32[M]: highest score so far, in log2
    total,  # f32[M]: sum of 2^(score - top)
    sums,  # f32[M, C]: sum of 2^(score - top) * v
    scale,
):
    """Adds one tile of keys to (top, total, sums). Row m sees key n if places[n] <= limits[m]; scores are in
    log2.

    Every sum is an explicit tl.fma or tl.dot, so that all kernels round it at the same points.
    """
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    scores = tl.where(places[None, :] <= limits[:, None], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1) * scale)
    weights = tl.exp2(tl.fma(scores, scale, -new_top[:, None]))
    shrink = tl.exp2(top - new_top)
    total = tl.fma(total, shrink, tl.sum(weights, 1))
    sums = tl.dot(weights.to(v.dtype), v, sums * shrink[:, None], input_precision="ieee")
    return new_top, total, sums


@triton.jit
def row_offsets(token, first, m, kv_head, K: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """The offsets in q [T, H, C] of rows `first` + m of the segment that starts at `token`: a 64-bit start,
    since T * H * C may exceed 2^31, and steps [M] from it. Row r is head r % R of kv head `kv_head`, at token
    r // R of the segment."""
    skip = first // R
    start = ((token.to(tl.int64) + skip) * K + kv_head) * (R * C)
    return start, (((first + m) // R - skip) * K * R + (first + m) % R) * C


@triton.jit
def stat_offset(token, first, kv_head, num_tokens, R: tl.constexpr):
    """The offset of row `first` in [K, T, R], where the rows of a segment are contiguous."""
    return (kv_head.to(tl.int64) * num_tokens + token) * R + first


# Tables start anywhere in a buffer; without do_not_specialize each alignment would compile another kernel.
@triton.jit(do_not_specialize=["tiles", "num_tokens"])
def attention_fwd_kernel(
    out,  # [T, H, C]
    stats,  # f32[K, T, R, 2]
    q,  # [T, H, C]
    k,  # [T, K, C]
    v,  # [T, K, C]
    tiles,  # i32[N, 5]: start, length, prefix_start, prefix_length, first row
    num_tokens, scale,
    K: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, UPCAST: tl.constexpr,
):
    """One tile of rows of one segment and kv head."""
    # The tile and its rows.
    tile, kv_head = tiles + tl.program_id(0) * 5, tl.program_id(1)
    start, length, prefix_start, prefix_length = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    first_row = tl.load(tile + 4)
    m, n, c = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_C)
    is_row = first_row + m < length * R
    row_mask = is_row[:, None] & (c[None, :] < C)
    row_start, row_steps = row_offsets(start, first_row, m, kv_head, K, R, C)
    at_row = row_steps[:, None] + c[None, :]
    rows = tl.load(q + row_start + at_row, mask=row_mask, other=0.0)
    if UPCAST:  # Triton's interpreter cannot multiply bf16
        rows = rows.to(tl.float32)
    # The prefix's tiles of keys, then the segment's.
    limits = (first_row + m) // R
    top = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
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
        top, total, sums = attend(rows, keys, values, places, limits, top, total, sums, scale)
    # Normalised and stored.
    result = (sums + 0.0) / total[:, None]  # + 0: turns -0 into +0, as a tile that adds nothing would
    tl.store(out + row_start + at_row, result.to(out.dtype.element_ty), mask=row_mask)
    at_stat = stats + stat_offset(start, first_row, kv_head, num_tokens, R) * 2 + m * 2
    tl.store(at_stat, top, mask=is_row)
    tl.store(at_stat + 1, total, mask=is_row)


@triton.jit(do_not_specialize=["table", "lens", "prefix_index", "order", "starts", "num_blocks", "width"])
def paged_attention_fwd_kernel(
    out,  # [T, H, C]
    prefix_sums,  # f32[T, H, C]
    prefix_stats,  # f32[T, H, 2]
    q,  # [T, H, C]
    k_cache,  # [K, num_blocks, PAGE, C]
    v_cache,  # [K, num_blocks, PAGE, C]
    table,  # i64[readers, width]: the prefixes' or the tokens' block table
    lens,  # i64[readers]
    prefix_index,  # i64[T]
    order,  # i64[T]
    starts,  # i64[B + 1]
    num_blocks, width, scale,
    IS_PREFIX: tl.constexpr, K: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, UPCAST: tl.constexpr,
):
    """One kv head. IS_PREFIX: the rows of some tokens that share a prefix, over its keys; writes prefix_sums
    and prefix_stats. Else the rows of one token, which continue from there over its own keys.

    The tokens of prefix b are order[starts[b]:starts[b + 1]]. Of their programs every (BLOCK_M // R)-th does
    the work and the others return, so that the host needs neither the tiles nor their number.
    """
    number, kv_head = tl.program_id(0), tl.program_id(1)
    m, n, c = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_C)
    # The rows of this program.
    if IS_PREFIX:
        reader = tl.load(prefix_index + tl.load(order + number))
        if (number - tl.load(starts + reader)) % (BLOCK_M // R) != 0:
            return
        place = number + m // R
        is_row = (m < BLOCK_M // R * R) & (place < tl.load(starts + reader + 1))
        token = tl.load(order + place, mask=is_row, other=0)
    else:
        reader = number.to(tl.int64)
        is_row = m < R
        token = reader + tl.zeros((BLOCK_M,), tl.int64)
    row = token * (K * R) + kv_head * R + m % R
    row_mask = is_row[:, None] & (c[None, :] < C)
    at_row = row[:, None] * C + c[None, :]
    rows = tl.load(q + at_row, mask=row_mask, other=0.0)
    if UPCAST:
        rows = rows.to(tl.float32)
    # Their sums so far.
    if IS_PREFIX:
        top = tl.full((BLOCK_M,), LOWEST, tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        sums = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    else:
        top = tl.load(prefix_stats + row * 2, mask=is_row, other=LOWEST)
        total = tl.load(prefix_stats + row * 2 + 1, mask=is_row, other=1.0)
        sums = tl.load(prefix_sums + at_row, mask=row_mask, other=0.0)
    # The keys, from the blocks of the table.
    length = tl.load(lens + reader)
    limits = tl.zeros((BLOCK_M,), tl.int32)
    at_key = (n % PAGE)[:, None] * C + c[None, :]
    for first in range(0, length, BLOCK_N):
        is_key = first + n < length
        places = tl.where(is_key, 0, NEVER)
        block = tl.load(table + reader * width + (first + n) // PAGE, mask=is_key, other=0)
        key_start, key_mask = (kv_head.to(tl.int64) * num_blocks + block) * (PAGE * C), is_key[:, None] & (c[None, :] < C)
        keys = tl.load(k_cache + key_start[:, None] + at_key, mask=key_mask, other=0.0)
        values = tl.load(v_cache + key_start[:, None] + at_key, mask=key_mask, other=0.0)
        if UPCAST:
            keys, values = keys.to(tl.float32), values.to(tl.float32)
        top, total, sums = attend(rows, keys, values, places, limits, top, total, sums, scale)
    # Sums over the prefix, or the result.
    if IS_PREFIX:
        tl.store(prefix_sums + at_row, sums, mask=row_mask)
        tl.store(prefix_stats + row * 2, top, mask=is_row)
        tl.store(prefix_stats + row * 2 + 1, total, mask=is_row)
    else:
        result = (sums + 0.0) / total[:, None]
        tl.store(out + at_row, result.to(out.dtype.element_ty), mask=row_mask)


def log2_scale(scale: float) -> float:
    """The scale of scores in log2. At least 1e-18, so that a masked score stays -inf; all weights are then
    equal, as at 0."""
    return max(scale / math.log(2.0), 1e-18)


def attention_fwd(
    out: torch.Tensor, stats: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tiles: torch.Tensor,
    parts: torch.Tensor, wholes: torch.Tensor, readers: torch.Tensor, merges: torch.Tensor, scale: float,
) -> None:
    """stats f32[K, T, H / K, 2]: each row's highest score in log2, and its sum of 2^(score - highest)."""
    if not len(tiles):
        return
    if scale < 0:
        q, scale = -q, -scale
    (num_tokens, num_heads, head_dim), num_kv_heads = q.shape, k.shape[1]
    attention_fwd_kernel[len(tiles), num_kv_heads](
        out, stats, q, k, v, tiles, num_tokens, log2_scale(scale), K=num_kv_heads, R=num_heads // num_kv_heads, C=head_dim,
        **forward_config(head_dim, q.dtype), UPCAST=IS_INTERPRETED)


def paged_attention(
    out: torch.Tensor, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, prefix_table: torch.Tensor,
    prefix_lens: torch.Tensor, prefix_index: torch.Tensor, own_table: torch.Tensor, own_lens: torch.Tensor, order: torch.Tensor,
    starts: torch.Tensor, scale: float,
) -> None:
    if not len(q):
        return
    if scale < 0:
        q, scale = -q, -scale
    (num_rows, num_heads, head_dim), (num_kv_heads, num_blocks) = q.shape, k_cache.shape[:2]
    sums = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    stats = torch.empty(num_rows, num_heads, 2, dtype=torch.float32, device=q.device)
    repeat = num_heads // num_kv_heads
    config = paged_config(head_dim, q.dtype, repeat, capability(q.device))
    for is_prefix, table, lens in ((True, prefix_table, prefix_lens), (False, own_table, own_lens)):
        paged_attention_fwd_kernel[num_rows, num_kv_heads](
            out, sums, stats, q, k_cache, v_cache, table, lens, prefix_index, order, starts, num_blocks, table.shape[1],
            log2_scale(scale), IS_PREFIX=is_prefix, K=num_kv_heads, R=repeat, C=head_dim, **config, UPCAST=IS_INTERPRETED)


@functools.cache
def capability(device: torch.device) -> int:
    """90 for sm_90; 0 if kernels are interpreted."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
