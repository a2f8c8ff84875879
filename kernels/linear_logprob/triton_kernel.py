"""`linear_logprob` on a GPU: computes the head's logits tile by tile, without ever storing them in f32.

Forward, 2NDV flops: a program takes BLOCK_M rows and one chunk of the vocabulary. It walks the chunk's tiles
and updates for each row the largest logit, and relative to it the sum of exp and the sum of exp * logit. A
second kernel merges the chunks in f64. Chunks and tiles follow from V alone, so a row's bits do not depend on
its batch; `sample` calls the same functions. At most MAX_CHUNKS chunks: 12 bytes per row and chunk, and
enough programs for a decode step of few rows.

Backward, 4NDV flops, and 2NDV more without a saved softmax: for VOCAB_CHUNK tokens at a time it computes
dlogits, rounded to hidden's dtype, in up to DLOGITS_BYTES, then the two products by `linear`'s kernel.
dhidden is summed in f32 in the order of the chunks; each chunk's rows of dweight are written once. If N rows
exceed DLOGITS_BYTES they are processed in blocks, and only dweight adds up over blocks. An f32 master is
rounded to a copy in hidden's dtype: all of it in the forward pass, chunk by chunk in the backward.

A 128 x 256 tile of logits is 128 sums per thread in registers, so one program of 8 warps runs per SM. Groups
of 16 row tiles walk the vocabulary together, so that a weight tile is loaded from memory once for 2,048 rows.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from kernels.ahead_of_time import Compile, pointer
from kernels.linear.triton_kernel import halves, linear_dgrad, linear_wgrad, product_tile
from kernels.linear_logprob.function import SOFTMAX_TILE
from kernels.triton_math import grouped_tile, rounded
from kernels.triton_ops import IS_INTERPRETED

MAX_CHUNKS = 128
"""Most chunks of the vocabulary in the forward pass."""
VOCAB_CHUNK = 8192
DLOGITS_BYTES = 1 << 27
"""Workspace of the backward pass for dlogits."""
KEPT_ROWS = 16
LEAST = tl.constexpr(-3.4e38)


@triton.jit
def logits_tile(
    hidden,  # [N, D], contiguous
    weight,  # [V, D], contiguous
    m,  # i64[BLOCK_M]
    tile, N, V, D, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_D: tl.constexpr, UPCAST: tl.constexpr,
):
    """z f32[BLOCK_M, BLOCK_N] = hidden[m] . weight[n] * scale for the tokens n of one tile, -inf where n >=
    V."""
    column = tl.arange(0, BLOCK_N)
    n = tile * BLOCK_N + column.to(tl.int64)
    z = product_tile(tl.zeros((BLOCK_M, BLOCK_N), tl.float32), hidden, weight, m, n, N, V, 0, D, D, 1, 1, D,
                     BLOCK_M, BLOCK_N, BLOCK_K, EVEN_D, UPCAST)
    # An explicit fma: the compiler could fuse a plain product with a following sum, in one kernel and not in
    # another.
    z = tl.fma(z, tl.full(z.shape, scale, tl.float32), tl.zeros_like(z))
    return tl.where(column[None, :] < V - tile * BLOCK_N, z, float("-inf"))


@triton.jit
def exp_sums(z, base, softmax, m, first, N, V, IS_KEPT: tl.constexpr):
    """-> (sum of e, sum of e * (z - base)), f32[M], with e = exp(z - base). IS_KEPT: softmax[m, first:] =
    e."""
    shifted = z - base[:, None]
    e = tl.exp(shifted)
    if IS_KEPT:
        column = tl.arange(0, z.shape[1])
        place = softmax + (m * V + first)[:, None] + column[None, :]
        tl.store(place, rounded(e, softmax.dtype.element_ty), mask=(m[:, None] < N) & (column[None, :] < V - first))
    # A logit of -inf adds 0, not 0 * inf.
    return tl.sum(e, 1), tl.sum(e * tl.maximum(shifted, LEAST), 1)


@triton.jit
def add_tile(top, total, weighted, z, softmax, m, first, N, V, IS_KEPT: tl.constexpr):
    """Adds a tile z of logits, of the tokens from `first` on, to each row's (largest, sum of exp(z -
    largest), sum of exp(z - largest) * (z - largest)), f32[BLOCK_M], which start as (-inf, 0, 0). NaN and inf
    reach the sums."""
    highest = tl.maximum(top, tl.max(z, 1))
    base = tl.where(highest == float("-inf"), 0.0, highest)
    # The sums of the tile, a quarter at a time: fewer registers.
    left, right = halves(z)
    a, b = halves(left)
    c, d = halves(right)
    width: tl.constexpr = z.shape[1] // 4
    sum_a, weighted_a = exp_sums(a, base, softmax, m, first, N, V, IS_KEPT)
    sum_b, weighted_b = exp_sums(b, base, softmax, m, first + width, N, V, IS_KEPT)
    sum_c, weighted_c = exp_sums(c, base, softmax, m, first + 2 * width, N, V, IS_KEPT)
    sum_d, weighted_d = exp_sums(d, base, softmax, m, first + 3 * width, N, V, IS_KEPT)
    # The earlier sums, rescaled from the old largest logit to the new one.
    down = top - base
    factor = tl.exp(down)
    carried = tl.where(factor == 0.0, 0.0, tl.fma(total, down, weighted) * factor)
    return (highest, tl.fma(total, factor, (sum_a + sum_b) + (sum_c + sum_d)),
            carried + ((weighted_a + weighted_b) + (weighted_c + weighted_d)))


@triton.jit
def merged_chunks(partials, m, N, num_chunks, CHUNKS: tl.constexpr):
    """partials f32[3, num_chunks, N] -> for rows m (largest f32, log of the sum f64, weighted sum / sum
    f64)."""
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
    logprob,  # f32[N]
    partials,  # f32[3, num_chunks, N]
    softmax,  # bf16[N, V], or [0, V]
    tops,  # f32[tiles, N], or [tiles, 0]
    hidden,  # f32|bf16[N, D]
    weight,  # [V, D], hidden's dtype
    target_ids,  # i64[N]
    scale, N, V, D, num_chunks, tiles_per_chunk,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, EVEN_D: tl.constexpr,
    IS_KEPT: tl.constexpr, UPCAST: tl.constexpr,
):
    """Writes the chunk's column of `partials`, and to logprob[n] the logit of n's target if the chunk holds
    it. IS_KEPT: also softmax[n] = exp(logit - tops[tile, n]), tops being the row's largest logit so far."""
    # The rows and their targets; -1 for one outside the vocabulary.
    tile_m, chunk = grouped_tile(tl.program_id(0), tl.cdiv(N, BLOCK_M), num_chunks, GROUP_M)
    m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    targets = tl.load(target_ids + m, mask=m < N, other=-1)
    targets = tl.where((targets >= 0) & (targets < V), targets, -1).to(tl.int32)
    column = tl.arange(0, BLOCK_N)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    weighted = tl.zeros((BLOCK_M,), tl.float32)
    last = tl.minimum((chunk + 1) * tiles_per_chunk, tl.cdiv(V, BLOCK_N))
    # The chunk's tiles: the target's logit, and the running sums.
    for tile in range(chunk * tiles_per_chunk, last):
        z = logits_tile(hidden, weight, m, tile, N, V, D, scale, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_D, UPCAST)
        target = targets - tile * BLOCK_N
        picked = tl.sum(tl.where(column[None, :] == target[:, None], z, 0.0), 1)
        tl.store(logprob + m, picked, mask=(target >= 0) & (target < tl.minimum(BLOCK_N, V - tile * BLOCK_N)) & (m < N))
        top, total, weighted = add_tile(top, total, weighted, z, softmax, m, tile * BLOCK_N, N, V, IS_KEPT)
        if IS_KEPT:
            tl.store(tops + tl.full((), tile, tl.int64) * N + m, top, mask=m < N)
    # The chunk's sums.
    place = partials + chunk.to(tl.int64) * N + m
    part = num_chunks.to(tl.int64) * N
    tl.store(place, top, mask=m < N)
    tl.store(place + part, total, mask=m < N)
    tl.store(place + 2 * part, weighted, mask=m < N)


@triton.jit(do_not_specialize=["N", "num_chunks"])
def linear_logprob_merge_kernel(
    logprob,  # f32[N], in place
    entropy,  # f32[N]
    stats,  # f32[N, 2]: largest logit, log of the sum of exp(logit - largest)
    partials,  # f32[3, num_chunks, N]
    target_ids,  # i64[N]
    N, V, num_chunks, CHUNKS: tl.constexpr, ROWS: tl.constexpr,
):
    """logprob holds the target's logit and becomes its logprob; NaN for a target outside the vocabulary."""
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = m < N
    highest, log_sum, mean = merged_chunks(partials, m, N, num_chunks, CHUNKS)
    target = tl.load(target_ids + m, mask=inside, other=0)
    z = tl.load(logprob + m, mask=inside, other=0.0)
    tl.store(logprob + m, tl.where((target >= 0) & (target < V), z - highest - log_sum.to(tl.float32), float("nan")), mask=inside)
    tl.store(entropy + m, (log_sum - mean).to(tl.float32), mask=inside)
    tl.store(stats + 2 * m, highest, mask=inside)
    tl.store(stats + 2 * m + 1, log_sum.to(tl.float32), mask=inside)


@triton.jit
def row_gradients(dlogprob, dentropy, stats, entropy, target_ids, m, N, token):
    """-> for rows m: dlogprob, dentropy, log of the sum, largest logit, entropy, and target - token."""
    inside = m < N
    return (tl.load(dlogprob + m, mask=inside, other=0.0), tl.load(dentropy + m, mask=inside, other=0.0),
            tl.load(stats + 2 * m + 1, mask=inside, other=0.0), tl.load(stats + 2 * m, mask=inside, other=0.0),
            tl.load(entropy + m, mask=inside, other=0.0), (tl.load(target_ids + m, mask=inside, other=-1) - token).to(tl.int32))


@triton.jit
def store_dlogits(dlogits, log_p, rows, scale, m, first, N, V, stride):
    """dlogits[m, first:] = d(dlogprob * logprob + dentropy * entropy) / d(hidden . weight), from the logprobs
    log_p."""
    dlogprob, dentropy, _, _, entropy, target = rows
    column = tl.arange(0, log_p.shape[1])
    # exp(log_p) is 0 below -87; a log_p of -inf would give NaN.
    slope = -dlogprob[:, None] - (tl.maximum(log_p, -1e4) + entropy[:, None]) * dentropy[:, None]
    dz = tl.exp(log_p) * slope + tl.where(column[None, :] == (target - first)[:, None], dlogprob[:, None], 0.0)
    place = dlogits + (m * stride + first)[:, None] + column[None, :]
    tl.store(place, rounded(dz * scale, dlogits.dtype.element_ty), mask=(m[:, None] < N) & (column[None, :] < V - first))


@triton.jit(do_not_specialize=["N", "token"])
def linear_logprob_bwd_kernel(
    dlogits,  # [N, V], rows `stride` apart, hidden's dtype
    dlogprob,  # f32[N]
    dentropy,  # f32[N]
    hidden,  # f32|bf16[N, D]
    weight,  # [V, D]: the chunk's rows, of the tokens from `token` on
    target_ids,  # i64[N]
    stats,  # f32[N, 2]
    entropy,  # f32[N]
    scale, N, V, D, token, stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, EVEN_D: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """dlogits of a chunk of V tokens of the vocabulary. Recomputes the logits."""
    tile_m, tile = grouped_tile(tl.program_id(0), tl.cdiv(N, BLOCK_M), tl.cdiv(V, BLOCK_N), GROUP_M)
    m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    z = logits_tile(hidden, weight, m, tile, N, V, D, scale, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_D, UPCAST)
    rows = row_gradients(dlogprob, dentropy, stats, entropy, target_ids, m, N, token)
    left, right = halves(z - rows[3][:, None] - rows[2][:, None])
    a, b = halves(left)
    c, d = halves(right)
    width: tl.constexpr = BLOCK_N // 4
    store_dlogits(dlogits, a, rows, scale, m, tile * BLOCK_N, N, V, stride)
    store_dlogits(dlogits, b, rows, scale, m, tile * BLOCK_N + width, N, V, stride)
    store_dlogits(dlogits, c, rows, scale, m, tile * BLOCK_N + 2 * width, N, V, stride)
    store_dlogits(dlogits, d, rows, scale, m, tile * BLOCK_N + 3 * width, N, V, stride)


@triton.jit(do_not_specialize=["N", "num_rows", "token"])
def linear_logprob_bwd_kept_kernel(
    dlogits,  # bf16[N, V], rows `stride` apart
    dlogprob,  # f32[N]
    dentropy,  # f32[N]
    softmax,  # bf16[N, V], rows `stride_softmax` apart, from `token` on
    tops,  # f32[tiles, num_rows], from the tile of `token` on
    target_ids,  # i64[N]
    stats,  # f32[N, 2]
    entropy,  # f32[N]
    scale, N, V, token, stride, num_rows, stride_softmax,
    ROWS: tl.constexpr, TILE: tl.constexpr,
):
    """dlogits of the same chunk from the saved softmax, without a product."""
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    tile = tl.program_id(1)
    column = tl.arange(0, TILE)
    place = softmax + (m * stride_softmax + tile * TILE)[:, None] + column[None, :]
    e = tl.load(place, mask=(m[:, None] < N) & (column[None, :] < V - tile * TILE), other=0.0).to(tl.float32)
    rows = row_gradients(dlogprob, dentropy, stats, entropy, target_ids, m, N, token)
    top = tl.load(tops + tile.to(tl.int64) * num_rows + m, mask=m < N, other=0.0)
    log_p = tl.log(e) + (top - rows[3] - rows[2])[:, None]
    store_dlogits(dlogits, log_p, rows, scale, m, tile * TILE, N, V, stride)


def config(dtype: torch.dtype, vocab_size: int, hidden_size: int) -> dict[str, int]:
    """Tile and launch options of the logits, from the head's sizes alone."""
    if dtype == torch.bfloat16:
        block_n, num_warps = (SOFTMAX_TILE, 8) if vocab_size > 4 * SOFTMAX_TILE else (64, 4)
        return {"BLOCK_M": 128, "BLOCK_N": block_n, "BLOCK_K": 64, "GROUP_M": 16, "num_warps": num_warps, "num_stages": 4}
    return {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 16, "GROUP_M": 16, "num_warps": 8, "num_stages": 3}


def merge_config(num_chunks: int) -> dict[str, int]:
    """16 sums per thread for any number of chunks."""
    chunks = triton.next_power_of_2(num_chunks)
    return {"CHUNKS": chunks, "ROWS": 2 * 1024 // chunks, "num_warps": 4}


def chunks_of(vocab_size: int, block_n: int) -> tuple[int, int]:
    """-> (chunks of the vocabulary, tiles per chunk)."""
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
        logprob, partials, softmax, tops, hidden, weight.to(hidden.dtype), target_ids, 1 / temperature, num_rows, vocab_size,
        hidden_size, num_chunks, tiles_per_chunk, **chosen, EVEN_D=hidden_size % chosen["BLOCK_K"] == 0,
        IS_KEPT=softmax.shape[0] > 0, UPCAST=IS_INTERPRETED)
    merged = merge_config(num_chunks)
    linear_logprob_merge_kernel[(triton.cdiv(num_rows, merged["ROWS"]),)](
        logprob, entropy, stats, partials, target_ids, num_rows, vocab_size, num_chunks, **merged)


def linear_logprob_bwd(
    dhidden: torch.Tensor, dweight: torch.Tensor, dlogprob: torch.Tensor, dentropy: torch.Tensor, hidden: torch.Tensor,
    weight: torch.Tensor, target_ids: torch.Tensor, stats: torch.Tensor, entropy: torch.Tensor, softmax: torch.Tensor,
    tops: torch.Tensor, temperature: float, is_added: bool = False,
) -> None:
    """is_added: adds to dweight instead of overwriting it."""
    (num_rows, hidden_size), vocab_size = hidden.shape, weight.shape[0]
    if not num_rows and not is_added:
        dweight.zero_()
    # As many rows at a time as the dlogits of one chunk of the vocabulary fit.
    width = triton.cdiv(min(vocab_size, VOCAB_CHUNK), 64) * 64
    step = max(1, DLOGITS_BYTES // (width * hidden.element_size()) // 128) * 128
    workspace = hidden.new_empty(min(step, num_rows), width)
    for first in range(0, num_rows, step):
        rows = slice(first, min(first + step, num_rows))
        total = hidden.new_empty(rows.stop - first, hidden_size, dtype=torch.float32) if vocab_size > VOCAB_CHUNK else None
        for token in range(0, vocab_size, VOCAB_CHUNK):
            chunk = slice(token, min(token + VOCAB_CHUNK, vocab_size))
            # dlogits of the block and chunk, then its part of both products.
            dlogits = workspace[: rows.stop - first, : chunk.stop - token]
            matrix = weight[chunk].to(hidden.dtype)
            of_rows = (dlogprob[rows], dentropy[rows], target_ids[rows], stats[rows], entropy[rows])
            if softmax.shape[0]:
                dlogits_of_kept(dlogits, *of_rows, softmax[rows, chunk], tops[token // SOFTMAX_TILE :, rows], token, temperature)
            else:
                dlogits_of(dlogits, *of_rows, hidden[rows], matrix, token, temperature)
            out = dhidden[rows] if total is None or chunk.stop == vocab_size else total
            linear_dgrad(out, dlogits, matrix, total if token else None)
            linear_wgrad(dweight[chunk], dlogits, hidden[rows], dweight[chunk] if first or is_added else None)


def dlogits_of(
    dlogits: torch.Tensor, dlogprob: torch.Tensor, dentropy: torch.Tensor, target_ids: torch.Tensor, stats: torch.Tensor,
    entropy: torch.Tensor, hidden: torch.Tensor, matrix: torch.Tensor, token: int, temperature: float,
) -> None:
    (num_rows, num_tokens), hidden_size = dlogits.shape, hidden.shape[1]
    chosen = config(hidden.dtype, num_tokens, hidden_size)
    linear_logprob_bwd_kernel[(triton.cdiv(num_rows, chosen["BLOCK_M"]) * triton.cdiv(num_tokens, chosen["BLOCK_N"]),)](
        dlogits, dlogprob, dentropy, hidden, matrix, target_ids, stats, entropy, 1 / temperature, num_rows, num_tokens, hidden_size,
        token, dlogits.stride(0), **chosen, EVEN_D=hidden_size % chosen["BLOCK_K"] == 0, UPCAST=IS_INTERPRETED)


def dlogits_of_kept(
    dlogits: torch.Tensor, dlogprob: torch.Tensor, dentropy: torch.Tensor, target_ids: torch.Tensor, stats: torch.Tensor,
    entropy: torch.Tensor, softmax: torch.Tensor, tops: torch.Tensor, token: int, temperature: float,
) -> None:
    num_rows, num_tokens = dlogits.shape
    linear_logprob_bwd_kept_kernel[(triton.cdiv(num_rows, KEPT_ROWS), triton.cdiv(num_tokens, SOFTMAX_TILE))](
        dlogits, dlogprob, dentropy, softmax, tops, target_ids, stats, entropy, 1 / temperature, num_rows, num_tokens, token,
        dlogits.stride(0), tops.stride(0), softmax.stride(0), ROWS=KEPT_ROWS, TILE=SOFTMAX_TILE, num_warps=4)


def compiles() -> list[Compile]:
    """The kernels of a wide head and of a narrow one, with and without a saved softmax."""
    found = []
    for dtype, vocab_size, hidden_size in (
        (torch.bfloat16, 64, 128), (torch.bfloat16, 131_072, 4096), (torch.float32, 64, 128),
    ):
        chosen = config(dtype, vocab_size, hidden_size)
        options = chosen | {"EVEN_D": True, "UPCAST": False}
        same = {"is_matrix_product": True, "may_spill": dtype == torch.bfloat16}  # on sm_80 and sm_100
        tile = f"{chosen['BLOCK_M']}x{chosen['BLOCK_N']}"
        for is_kept in (False, True)[: 1 + (chosen["BLOCK_N"] == SOFTMAX_TILE)]:
            found.append(Compile(
                f"linear_logprob_fwd {tile}{' kept' if is_kept else ''}", dtype, linear_logprob_fwd_kernel,
                types_of(linear_logprob_fwd_kernel, options, dtype), options | {"IS_KEPT": is_kept}, **same))
        found.append(Compile(f"linear_logprob_bwd {tile}", dtype, linear_logprob_bwd_kernel,
                             types_of(linear_logprob_bwd_kernel, options, dtype), options, **same))
        merged = merge_config(chunks_of(vocab_size, chosen["BLOCK_N"])[0])
        found.append(Compile(f"linear_logprob_merge {merged['CHUNKS']}x{merged['ROWS']}", dtype, linear_logprob_merge_kernel,
                             types_of(linear_logprob_merge_kernel, merged, dtype), merged))
    options = {"ROWS": KEPT_ROWS, "TILE": SOFTMAX_TILE, "num_warps": 4}
    found.append(Compile("linear_logprob_bwd kept", torch.bfloat16, linear_logprob_bwd_kept_kernel,
                         types_of(linear_logprob_bwd_kept_kernel, options, torch.bfloat16), options))
    return found


def types_of(kernel: Any, options: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The types of a kernel's arguments: pointers by name, numbers as i32."""
    f32 = ("logprob", "entropy", "stats", "partials", "tops", "dlogprob", "dentropy")
    known = dict.fromkeys(f32, "*fp32") | dict.fromkeys(("hidden", "weight", "softmax", "dlogits"), pointer(dtype))
    known |= {"target_ids": "*i64", "scale": "fp32"}
    return {name: known.get(name, "i32") for name in kernel.arg_names if name not in (*options, "IS_KEPT")}
