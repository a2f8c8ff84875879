"""`linear_logprob` on a GPU: the head's logits tile by tile, never written out in f32.

Forward, 2NDV flops: a program takes BLOCK_M rows and one chunk of the vocabulary, and keeps of each row (largest logit, sum of exp, sum of
exp * logit, the last two less the largest) while it walks the chunk's tiles; a second kernel merges the chunks in f64. Chunks and
tiles follow from V alone, so a row's bits do not depend on its batch. `sample` takes its logits and sums by the same functions.
At most MAX_CHUNKS chunks: 12 bytes a row and chunk, and enough programs for a decode step of few rows.

A 128 x 256 tile of logits is 128 sums a thread in registers, one program of 8 warps an SM; groups of 16 row tiles go through the
vocabulary together, so that a weight tile comes from memory once for 2,048 rows.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from kernels.ahead_of_time import Compile, pointer
from kernels.linear.triton_kernel import grouped_tile, product_tile
from kernels.linear_logprob.function import SOFTMAX_TILE
from kernels.triton_ops import DTYPES, IS_INTERPRETED

MAX_CHUNKS = 128
"""Of the vocabulary, in the forward pass."""
MERGED_ROWS = 16
LEAST = tl.constexpr(-3.4e38)


@triton.jit
def logits_tile(
    hidden, weight, m, tile, N, V, D, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_D: tl.constexpr, UPCAST: tl.constexpr,
):
    """z f32[BLOCK_M, BLOCK_N] = hidden[m] . weight[n] * scale for the n of one tile of the vocabulary, -inf where n >= V.
    hidden [N, D] and weight [V, D] are contiguous, m is i64."""
    column = tl.arange(0, BLOCK_N)
    n = tile * BLOCK_N + column.to(tl.int64)
    z = product_tile(hidden, weight, m, n, N, V, 0, D, D, 1, 1, D, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_D, UPCAST)
    # As fma: a plain product could be merged into a sum that follows it, in one kernel and not in the other.
    z = tl.fma(z, tl.full(z.shape, scale, tl.float32), tl.zeros_like(z))
    return tl.where(column[None, :] < V - tile * BLOCK_N, z, float("-inf"))


@triton.jit
def halves(z):
    """[M, N] -> its left and its right half: as many steps of work, and half the registers in each."""
    return tl.split(tl.permute(tl.reshape(z, (z.shape[0], 2, z.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def exp_sums(z, base, softmax, m, first, N, V, IS_KEPT: tl.constexpr):
    """-> (sum of e, sum of e * (z - base)) with e = exp(z - base), f32[M]. IS_KEPT: softmax[m, first..] = e."""
    shifted = z - base[:, None]
    e = tl.exp(shifted)
    if IS_KEPT:
        column = tl.arange(0, z.shape[1])
        place = softmax + (m * V + first)[:, None] + column[None, :]
        tl.store(place, e.to(softmax.dtype.element_ty), mask=(m[:, None] < N) & (column[None, :] < V - first))
    # A logit of -inf has no share: 0, not 0 * inf.
    return tl.sum(e, 1), tl.sum(e * tl.maximum(shifted, LEAST), 1)


@triton.jit
def add_tile(top, total, weighted, z, softmax, m, first, N, V, IS_KEPT: tl.constexpr):
    """One more tile z of logits, those from `first` on, in the rows' (largest, sum of exp(z - largest), sum of exp(z - largest)
    * (z - largest)), f32[BLOCK_M]. They begin as (-inf, 0, 0). NaN and inf end up in the sums."""
    highest = tl.maximum(top, tl.max(z, 1))
    base = tl.where(highest == float("-inf"), 0.0, highest)
    left, right = halves(z)
    a, b = halves(left)
    c, d = halves(right)
    width: tl.constexpr = z.shape[1] // 4
    sum_a, weighted_a = exp_sums(a, base, softmax, m, first, N, V, IS_KEPT)
    sum_b, weighted_b = exp_sums(b, base, softmax, m, first + width, N, V, IS_KEPT)
    sum_c, weighted_c = exp_sums(c, base, softmax, m, first + 2 * width, N, V, IS_KEPT)
    sum_d, weighted_d = exp_sums(d, base, softmax, m, first + 3 * width, N, V, IS_KEPT)
    down = top - base
    factor = tl.exp(down)
    carried = tl.where(factor == 0.0, 0.0, tl.fma(total, down, weighted) * factor)
    return (highest, tl.fma(total, factor, (sum_a + sum_b) + (sum_c + sum_d)),
            carried + ((weighted_a + weighted_b) + (weighted_c + weighted_d)))


@triton.jit
def merged_chunks(partials, m, N, num_chunks, CHUNKS: tl.constexpr):
    """Rows m of partials f32[3, num_chunks, N] -> (largest f32, log of the sum f64, weighted sum / sum f64). CHUNKS: a power of 2."""
    chunk = tl.arange(0, CHUNKS)
    place = partials + chunk[:, None].to(tl.int64) * N + m[None, :]
    inside = (chunk[:, None] < num_chunks) & (m[None, :] < N)
    part = num_chunks.to(tl.int64) * N
    top = tl.load(place, mask=inside, other=float("-inf"))
    total = tl.load(place + part, mask=inside, other=0.0).to(tl.float64)
    weighted = tl.load(place + 2 * part, mask=inside, other=0.0).to(tl.float64)
    highest = tl.max(top, 0)
    down = (top - highest[None, :]).to(tl.float64)
    factor = tl.exp(down)
    share = tl.where(factor == 0.0, 0.0, (weighted + total * down) * factor)
    total = tl.sum(tl.where(factor == 0.0, 0.0, total * factor), 0)
    return highest, tl.log(total), tl.sum(share, 0) / total


@triton.jit(do_not_specialize=["N", "num_chunks", "tiles_per_chunk"])
def linear_logprob_fwd_kernel(
    logprob, partials, softmax, tops, hidden, weight, target_ids, scale, N, V, D, num_chunks, tiles_per_chunk,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, EVEN_D: tl.constexpr,
    IS_KEPT: tl.constexpr, UPCAST: tl.constexpr,
):
    """The chunk's share of `partials` f32[3, num_chunks, N], and in logprob[n] the logit of n's target if it lies in the chunk.
    IS_KEPT: also softmax[n] = exp(logit - tops[tile, n]), the largest so far."""
    tile_m, chunk = grouped_tile(tl.program_id(0), tl.cdiv(N, BLOCK_M), num_chunks, GROUP_M)
    m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    targets = tl.load(target_ids + m, mask=m < N, other=-1)
    targets = tl.where((targets >= 0) & (targets < V), targets, -1).to(tl.int32)
    column = tl.arange(0, BLOCK_N)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    weighted = tl.zeros((BLOCK_M,), tl.float32)
    last = tl.minimum((chunk + 1) * tiles_per_chunk, tl.cdiv(V, BLOCK_N))
    for tile in range(chunk * tiles_per_chunk, last):
        z = logits_tile(hidden, weight, m, tile, N, V, D, scale, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_D, UPCAST)
        target = targets - tile * BLOCK_N
        picked = tl.sum(tl.where(column[None, :] == target[:, None], z, 0.0), 1)
        tl.store(logprob + m, picked, mask=(target >= 0) & (target < tl.minimum(BLOCK_N, V - tile * BLOCK_N)) & (m < N))
        top, total, weighted = add_tile(top, total, weighted, z, softmax, m, tile * BLOCK_N, N, V, IS_KEPT)
        if IS_KEPT:
            tl.store(tops + tl.full((), tile, tl.int64) * N + m, top, mask=m < N)
    place = partials + chunk.to(tl.int64) * N + m
    part = num_chunks.to(tl.int64) * N
    tl.store(place, top, mask=m < N)
    tl.store(place + part, total, mask=m < N)
    tl.store(place + 2 * part, weighted, mask=m < N)


@triton.jit(do_not_specialize=["N", "num_chunks"])
def linear_logprob_merge_kernel(
    logprob, entropy, stats, partials, target_ids, N, V, num_chunks, CHUNKS: tl.constexpr, ROWS: tl.constexpr,
):
    """logprob in place: its target's logit becomes the logprob, NaN where the target is none of the vocabulary's."""
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = m < N
    highest, log_sum, mean = merged_chunks(partials, m, N, num_chunks, CHUNKS)
    target = tl.load(target_ids + m, mask=inside, other=0)
    z = tl.load(logprob + m, mask=inside, other=0.0)
    tl.store(logprob + m, tl.where((target >= 0) & (target < V), z - highest - log_sum.to(tl.float32), float("nan")), mask=inside)
    tl.store(entropy + m, (log_sum - mean).to(tl.float32), mask=inside)
    tl.store(stats + 2 * m, highest, mask=inside)
    tl.store(stats + 2 * m + 1, log_sum.to(tl.float32), mask=inside)


def config(dtype: torch.dtype, vocab_size: int, hidden_size: int) -> dict[str, int]:
    """Tile and launch of the logits, by the head's sizes alone."""
    if dtype == torch.bfloat16:
        block_n, num_warps = (SOFTMAX_TILE, 8) if vocab_size > 4 * SOFTMAX_TILE else (64, 4)
        return {"BLOCK_M": 128, "BLOCK_N": block_n, "BLOCK_K": 64, "GROUP_M": 16, "num_warps": num_warps, "num_stages": 4}
    return {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 16, "GROUP_M": 16, "num_warps": 8, "num_stages": 3}


def chunks_of(vocab_size: int, block_n: int) -> tuple[int, int]:
    """-> (chunks of the vocabulary, tiles of a chunk)."""
    num_tiles = triton.cdiv(vocab_size, block_n)
    tiles_per_chunk = triton.cdiv(num_tiles, MAX_CHUNKS)
    return triton.cdiv(num_tiles, tiles_per_chunk), tiles_per_chunk


def linear_logprob_fwd(
    logprob: torch.Tensor, entropy: torch.Tensor, stats: torch.Tensor, softmax: torch.Tensor, tops: torch.Tensor,
    hidden: torch.Tensor, weight: torch.Tensor, target_ids: torch.Tensor, temperature: float,
) -> None:
    (num_rows, hidden_size), vocab_size = hidden.shape, weight.shape[0]
    if not num_rows:
        return
    chosen = config(hidden.dtype, vocab_size, hidden_size)
    num_chunks, tiles_per_chunk = chunks_of(vocab_size, chosen["BLOCK_N"])
    partials = hidden.new_empty(3, num_chunks, num_rows, dtype=torch.float32)
    linear_logprob_fwd_kernel[(triton.cdiv(num_rows, chosen["BLOCK_M"]) * num_chunks,)](
        logprob, partials, softmax, tops, hidden, weight.to(hidden.dtype), target_ids, 1 / temperature, num_rows, vocab_size, hidden_size,
        num_chunks, tiles_per_chunk, **chosen, EVEN_D=hidden_size % chosen["BLOCK_K"] == 0,
        IS_KEPT=softmax.shape[0] > 0, UPCAST=IS_INTERPRETED)
    linear_logprob_merge_kernel[(triton.cdiv(num_rows, MERGED_ROWS),)](
        logprob, entropy, stats, partials, target_ids, num_rows, vocab_size, num_chunks,
        CHUNKS=triton.next_power_of_2(num_chunks), ROWS=MERGED_ROWS, num_warps=4)
