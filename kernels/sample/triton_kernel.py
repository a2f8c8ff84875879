"""`sample` on a GPU: the head's logits tile by tile, and a draw after each tile. Only a truncated draw stores
[R, V].

    head    a program takes a tile of rows and a chunk of the vocabulary, as in linear_logprob's forward pass.
            For each row it computes the sums of the logprob, by linear_logprob's functions and tiles, so that
            both have the same bits; and the winner of the draw
    merge   merges the chunks of some rows, as linear_logprob does: sums, and winners (ties: lower token)

A tile of logits fills the registers, and most of its rows are empty in a decode step. So a tile goes through
a scratch buffer in L2, f32[num_chunks, R, BLOCK_N], 1 KB per row and chunk; the draw reads back only the rows
in use, DRAWN_ROWS at a time. The winner is the largest logit + noise, compared in f64. Two f64 logarithms per
token would cost more than the product: the noise is computed to NOISE_ERROR first, and in f64 only for tokens
that can still win. A tile whose logits are all too far below the best score draws no noise. Top-k, top-p and
min-p (triton_cut.py) need a whole row: then the head stores its logits, f32[R, V]. Scratch and logits take at
most CHUNK_BYTES; more rows are processed in blocks. Bytes moved: the weight, VD * itemsize; with a cut 4RV
more, written once, read 2 to 6 times. A row with NaN or inf among its logits gets the token -1, which needs
no device sync (`check_tokens`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.ahead_of_time import Compile, pointer
from kernels.linear_logprob.triton_kernel import MAX_CHUNKS, add_tile, chunks_of, config, logits_tile, merge_config, merged_chunks
from kernels.sample.function import check_tokens
from kernels.sample.triton_cut import CutSpec, cut_compiles, cut_spec, draw_kept, new_winners
from kernels.sample.triton_noise import NOISE_ERROR, gumbel, gumbel_near, philox_words
from kernels.triton_math import grouped_tile
from kernels.triton_ops import IS_INTERPRETED

CHUNK_BYTES = 1 << 28
MARGIN = tl.constexpr(2 * NOISE_ERROR.value + 4e-6)
"""A token this far below another by approximate scores cannot win. Scores that can win are below 26, and
three roundings add 1e-6 each."""
MAX_NOISE = tl.constexpr(23.0)
DRAWN_ROWS = 16
NO_TOKEN = tl.constexpr(2**31 - 1)


@triton.jit
def settle(best, token, picked, z, near, base, is_row, first, key, position):
    """Updates the rows' winners (score f64[M], token i32[M], its logit f32[M]) with tokens first .. first + W
    - 1 of logits z f32[M, W]. near f32[M, W]: their approximate scores minus base f32[M]."""
    column = tl.arange(0, z.shape[1])[None, :]
    threshold = tl.where(is_row, (best - base.to(tl.float64)).to(tl.float32) - MARGIN, float("inf"))
    pending, i = tl.max(near, 1, return_indices=True)
    while tl.max((pending > threshold).to(tl.int32), 0) > 0:
        # The exact score of the likeliest candidate of each row.
        candidate = first + i
        w0, w1, w2, w3 = philox_words(key, position, candidate // 4)
        word = tl.where(candidate % 2 == 0, tl.where(candidate % 4 == 0, w0, w2), tl.where(candidate % 4 == 1, w1, w3))
        logit = tl.sum(tl.where(column == i[:, None], z, 0.0), 1)
        score = logit.to(tl.float64) + gumbel(word).to(tl.float64)
        is_better = (pending > threshold) & ((score > best) | ((score == best) & (candidate < token)))
        best, token = tl.where(is_better, score, best), tl.where(is_better, candidate, token)
        picked = tl.where(is_better, logit, picked)
        threshold = tl.where(is_row, (best - base.to(tl.float64)).to(tl.float32) - MARGIN, float("inf"))
        near = tl.where(column == i[:, None], float("-inf"), near)
        pending, i = tl.max(near, 1, return_indices=True)
    return best, token, picked


@triton.jit
def draw_tile(
    scores,  # f64[num_chunks, R]
    tokens,  # i32[num_chunks, R]
    picks,  # f32[num_chunks, R]
    lowest,  # f32[num_chunks, R]
    scratch,  # f32[num_chunks, R, WIDTH]: the tile of logits
    keys,  # i64[R]
    positions,  # i64[R]
    m,  # i64[M]
    chunk, first, R, V, is_new,
    GREEDY: tl.constexpr, WIDTH: tl.constexpr,
):
    """Updates the winners of rows m in this chunk with one more tile of logits."""
    # The tile, and the winners so far.
    is_row, column = m < R, tl.arange(0, WIDTH)
    state, has_state = chunk.to(tl.int64) * R + m, (m < R) & (is_new == 0)
    inside = is_row[:, None] & (column[None, :] < V - first)
    z = tl.load(scratch + state[:, None] * WIDTH + column[None, :], mask=inside, other=float("-inf"))
    best = tl.load(scores + state, mask=has_state, other=float("-inf"))
    token = tl.load(tokens + state, mask=has_state, other=NO_TOKEN)
    picked = tl.load(picks + state, mask=has_state, other=0.0)
    least = tl.load(lowest + state, mask=has_state, other=float("inf"))
    number = tl.where(z == z, z, float("-inf"))
    least = tl.minimum(least, tl.min(tl.where(inside, number, float("inf")), 1))
    # The draw.
    peak, i = tl.max(z, 1, return_indices=True)
    if GREEDY:
        is_better = peak.to(tl.float64) > best
        best, token = tl.where(is_better, peak.to(tl.float64), best), tl.where(is_better, first + i, token)
        picked = tl.where(is_better, peak, picked)
    else:
        base = tl.where(peak == float("-inf"), 0.0, peak)
        if tl.max(tl.where(is_row, (base.to(tl.float64) - best).to(tl.float32), float("-inf")), 0) > -MAX_NOISE:
            key, position = tl.load(keys + m, mask=is_row, other=0), tl.load(positions + m, mask=is_row, other=0)
            block = first // 4 + tl.arange(0, WIDTH // 4)
            w0, w1, w2, w3 = philox_words(key[:, None], position[:, None], block[None, :])
            word = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
            near = z - base[:, None] + gumbel_near(word)
            best, token, picked = settle(best, token, picked, z, near, base, is_row, first, key, position)
    tl.debug_barrier()  # several threads read a row's state, one writes it
    tl.store(scores + state, best, mask=is_row)
    tl.store(tokens + state, token, mask=is_row)
    tl.store(picks + state, picked, mask=is_row)
    tl.store(lowest + state, least, mask=is_row)


@triton.jit(do_not_specialize=["R", "num_chunks", "tiles_per_chunk"])
def sample_head_kernel(
    partials,  # f32[3, num_chunks, R]
    scores,  # f64[num_chunks, R]: the best score of the chunk
    tokens,  # i32[num_chunks, R]: its token
    picks,  # f32[num_chunks, R]: its logit
    lowest,  # f32[num_chunks, R]: the lowest logit of the chunk, -inf if one is NaN
    logits,  # "keep": f32[R, V rounded up to whole tiles]; else the scratch f32[num_chunks, R, BLOCK_N]
    hidden,  # f32|bf16[R, D]
    weight,  # [V, D], hidden's dtype
    keys,  # i64[R]
    positions,  # i64[R]
    scale, R, V, D, num_chunks, tiles_per_chunk,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, EVEN_D: tl.constexpr,
    MODE: tl.constexpr, DRAWN_ROWS: tl.constexpr, UPCAST: tl.constexpr,
):
    """Writes the chunk's column of `partials`, and by MODE: "keep" the logits; "draw" or "greedy" the chunk's
    winner."""
    # The rows, and their sums.
    tile_m, chunk = grouped_tile(tl.program_id(0), tl.cdiv(R, BLOCK_M), num_chunks, GROUP_M)
    first_row = tile_m.to(tl.int64) * BLOCK_M
    m = first_row + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total, weighted = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    first_tile, last_tile = chunk * tiles_per_chunk, tl.minimum((chunk + 1) * tiles_per_chunk, tl.cdiv(V, BLOCK_N))
    for tile in range(first_tile, last_tile):
        first = tile * BLOCK_N
        z = logits_tile(hidden, weight, m, tile, R, V, D, scale, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_D, UPCAST)
        # 32-bit offsets within a tile: a 64-bit pointer per logit would not fit the registers.
        if MODE == "keep":
            stride = tl.cdiv(V, BLOCK_N) * BLOCK_N  # whole tiles
            corner = logits + first_row * stride + first
        else:
            stride = BLOCK_N
            corner = logits + (chunk.to(tl.int64) * R + first_row) * BLOCK_N
        row = tl.arange(0, BLOCK_M)
        tl.store(corner + (row[:, None] * stride + column[None, :]), z, mask=row[:, None] < R - first_row)
        top, total, weighted = add_tile(top, total, weighted, z, partials, m, first, R, V, False)
        if MODE != "keep":
            tl.debug_barrier()  # other threads read the tile than wrote it
            for row in tl.range(0, tl.minimum(BLOCK_M, R - first_row), DRAWN_ROWS, disable_licm=True):
                drawn = first_row + row + tl.arange(0, DRAWN_ROWS)
                draw_tile(scores, tokens, picks, lowest, logits, keys, positions, drawn, chunk, first, R, V, tile == first_tile,
                          MODE == "greedy", BLOCK_N)
            tl.debug_barrier()  # the next tile overwrites it
    # The chunk's sums.
    place = chunk.to(tl.int64) * R + m
    part = num_chunks.to(tl.int64) * R
    tl.store(partials + place, top, mask=m < R)
    tl.store(partials + part + place, total, mask=m < R)
    tl.store(partials + 2 * part + place, weighted, mask=m < R)


@triton.jit(do_not_specialize=["R", "num_chunks", "num_winners"])
def sample_merge_kernel(
    token,  # i64[R]
    logprob,  # f32[R]
    kept_logmass,  # f32[R]
    partials,  # f32[3, num_chunks, R]
    scores,  # f64[num_winners, R]
    tokens,  # i32[num_winners, R]
    picks,  # f32[num_winners, R]
    lowest,  # f32[num_winners, R]
    kept,  # i64[2, num_winners, R]: number and mass of the kept tokens; or None
    R, V, num_chunks, num_winners,
    CHUNKS: tl.constexpr, WINNERS: tl.constexpr, ROWS: tl.constexpr,
):
    """Merges the sums of the chunks and the winners of the chunks (or, after a cut, of the parts) of each
    row."""
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row = m < R
    highest, log_sum, _ = merged_chunks(partials, m, R, num_chunks, CHUNKS)
    # The best of the winners, or -1.
    winner = tl.arange(0, WINNERS)
    place = winner[:, None].to(tl.int64) * R + m[None, :]
    inside = (winner[:, None] < num_winners) & is_row[None, :]
    least = tl.min(tl.load(lowest + place, mask=inside, other=float("inf")), 0)
    score = tl.load(scores + place, mask=inside, other=float("-inf"))
    own = tl.load(tokens + place, mask=inside, other=NO_TOKEN)
    drawn = tl.min(tl.where(score == tl.max(score, 0)[None, :], own, NO_TOKEN), 0)
    z = tl.sum(tl.where(inside & (own == drawn[None, :]), tl.load(picks + place, mask=inside, other=0.0), 0.0), 0)
    is_sound = (highest < float("inf")) & (least - highest > float("-inf")) & (drawn != NO_TOKEN)
    tl.store(token + m, tl.where(is_sound, drawn, -1).to(tl.int64), mask=is_row)
    tl.store(logprob + m, z - highest - log_sum.to(tl.float32), mask=is_row)
    # The mass that truncation kept.
    logmass = tl.zeros((ROWS,), tl.float32)
    if kept is not None:
        num_kept = tl.sum(tl.load(kept + place, mask=inside, other=0), 0)
        mass = tl.sum(tl.load(kept + num_winners.to(tl.int64) * R + place, mask=inside, other=0), 0)
        # If all tokens are kept the result must be exactly 0, not the rounding of a sum.
        log_of_mass = tl.log(tl.maximum(mass, 1).to(tl.float64) * 8.673617379884035e-19).to(tl.float32)  # in units of 2^-60
        logmass = tl.where(num_kept == V, 0.0, tl.minimum(log_of_mass, 0.0))
    tl.store(kept_logmass + m, logmass, mask=is_row)


def draw_rows(
    token: torch.Tensor, logprob: torch.Tensor, kept_logmass: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor,
    keys: torch.Tensor, positions: torch.Tensor, temperature: float, cut: CutSpec | None,
) -> None:
    (num_rows, hidden_size), vocab_size, device = hidden.shape, weight.shape[0], hidden.device
    chosen, kept = config(hidden.dtype, vocab_size, hidden_size), None
    num_chunks, tiles_per_chunk = chunks_of(vocab_size, chosen["BLOCK_N"])
    # The head, which draws unless there is a cut.
    partials = torch.empty(3, num_chunks, num_rows, device=device, dtype=torch.float32)
    winners = new_winners(num_chunks if cut is None else 0, num_rows, device)
    block_n = chosen["BLOCK_N"]
    shape = (num_chunks, num_rows, block_n) if cut is None else (num_rows, triton.cdiv(vocab_size, block_n) * block_n)
    logits = torch.empty(shape, device=device, dtype=torch.float32)
    sample_head_kernel[(triton.cdiv(num_rows, chosen["BLOCK_M"]) * num_chunks,)](
        partials, *winners, logits, hidden, weight, keys, positions, 1 / (temperature or 1.0), num_rows, vocab_size, hidden_size,
        num_chunks, tiles_per_chunk, **chosen, EVEN_D=hidden_size % chosen["BLOCK_K"] == 0,
        MODE="keep" if cut is not None else "draw" if temperature else "greedy", DRAWN_ROWS=DRAWN_ROWS, UPCAST=IS_INTERPRETED)
    # The cut, then the merge.
    if cut is not None:
        winners, kept = draw_kept(logits, vocab_size, partials, keys, positions, cut)
    num_winners, merged = winners[0].shape[0], merge_config(num_chunks)
    sample_merge_kernel[(triton.cdiv(num_rows, merged["ROWS"]),)](
        token, logprob, kept_logmass, partials, *winners, kept, num_rows, vocab_size, num_chunks, num_winners,
        WINNERS=triton.next_power_of_2(num_winners), **merged)


def sample(
    token: torch.Tensor, logprob: torch.Tensor, kept_logmass: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor,
    keys: torch.Tensor, positions: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float,
) -> None:
    weight, (vocab_size, hidden_size) = weight.to(hidden.dtype), weight.shape
    cut = cut_spec(top_k, top_p, min_p) if temperature else None
    block_n = config(hidden.dtype, vocab_size, hidden_size)["BLOCK_N"]
    num_tiles = chunks_of(vocab_size, block_n)[0] if cut is None else triton.cdiv(vocab_size, block_n)
    step = max(1, CHUNK_BYTES // (4 * num_tiles * block_n))
    for first in range(0, hidden.shape[0], step):
        rows = slice(first, first + step)
        draw_rows(token[rows], logprob[rows], kept_logmass[rows], hidden[rows], weight, keys[rows], positions[rows], temperature,
                  cut)
    if token.is_cpu:
        check_tokens(token.tolist())


def compiles() -> list[Compile]:
    """The head at a vocabulary of 151,936, drawing or storing its logits, and the default model's in f32; and
    the later kernels."""
    f32, found = pointer(torch.float32), cut_compiles()
    winners = {"scores": "*fp64", "tokens": "*i32", "picks": f32, "lowest": f32}
    for mode, vocab_size, hidden_size, dtype in (
        ("draw", 151_936, 4096, torch.bfloat16), ("keep", 151_936, 4096, torch.bfloat16), ("draw", 64, 128, torch.float32),
    ):
        arguments = {"partials": f32, **winners, "logits": f32, "hidden": pointer(dtype), "weight": pointer(dtype), "keys": "*i64",
                     "positions": "*i64", "scale": "fp32", **dict.fromkeys(("R", "V", "D", "num_chunks", "tiles_per_chunk"), "i32")}
        options = config(dtype, vocab_size, hidden_size) | {
            "EVEN_D": True, "MODE": mode, "DRAWN_ROWS": DRAWN_ROWS, "UPCAST": False}
        found.append(Compile(f"sample_{mode} V{vocab_size}", dtype, sample_head_kernel, arguments, options, is_matrix_product=True,
                             may_spill=True))
    arguments = {"token": "*i64", "logprob": f32, "kept_logmass": f32, "partials": f32, **winners, "kept": "*i64",
                 **dict.fromkeys(("R", "V", "num_chunks", "num_winners"), "i32")}
    found.append(Compile("sample_merge", torch.float32, sample_merge_kernel, arguments,
                         merge_config(MAX_CHUNKS) | {"WINNERS": MAX_CHUNKS}))
    return found
