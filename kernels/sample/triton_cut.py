"""Top-k, top-p and min-p on a GPU, from logits f32[R, V] to one token per row: no sort, and no sum that
depends on its order.

The kept tokens are the first in the order (logprob falling, index rising), so a cut is a logprob and, among
the tokens that have exactly this logprob, a count. A radix search over the logprobs' bits finds it: for each
digit a histogram of token counts and mass, then the digit at which top_k or top_p is reached. Counts and mass
are integers, mass in units of 2^-60, so that atomic additions give the same sums in any order. A row is split
into parts of SPLIT tokens, with one program and one histogram each: enough programs for a few rows, and the
last histograms count the equal tokens of earlier parts. Each program of a level reads the histograms of the
level before, so launches are the only barriers: four for the digits and one for the draw (min-p alone: one).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from kernels.ahead_of_time import Compile, pointer
from kernels.linear_logprob.triton_kernel import MAX_CHUNKS, merged_chunks
from kernels.sample.triton_noise import gumbel, philox_words

LEVELS = tl.constexpr(4)
"""Digits of 8, 8, 8 and 7 bits. A logprob is at most 0, so the sign bit is left out."""
BINS = tl.constexpr(256)
SPLIT = 16_384
OFF = 1 << 62
CONFIG = {"SPLIT": SPLIT, "BLOCK": 1024, "num_warps": 4}


class CutSpec(NamedTuple):
    top_k: int
    top_p: int
    """In units of mass (2^-60), rounded up."""
    log_min_p: float


def cut_spec(top_k: int, top_p: float, min_p: float) -> CutSpec | None:
    """None if nothing is cut."""
    if not top_k and top_p == 1 and min_p == 0:
        return None
    log_min_p = math.log(float(torch.tensor(min_p, dtype=torch.float32))) if min_p > 0 else -math.inf
    return CutSpec(top_k or OFF, math.ceil(math.ldexp(top_p, 60)) if top_p < 1 else OFF, log_min_p)


@triton.jit
def row_sums(partials, r, R, num_chunks, CHUNKS: tl.constexpr):
    """-> (the row's largest logit, log of the sum of exp(logit - largest)), f32."""
    highest, log_sum, _ = merged_chunks(partials, r + tl.arange(0, 1), R, num_chunks, CHUNKS)
    return tl.sum(highest, 0), tl.sum(log_sum.to(tl.float32), 0)


@triton.jit
def order_key(logprob):
    """-> i32 that rises as the logprob falls."""
    return logprob.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def mass_of(logprob):
    return (tl.exp(logprob.to(tl.float64)) * 1152921504606846976.0).to(tl.int64)  # 2^60


@triton.jit
def descend(
    counts,  # i32[LEVELS, R, num_parts, BINS]
    masses,  # i64[LEVELS, R, num_parts, BINS]
    state,  # i64[LEVELS, 3, R]
    r, R, num_parts, top_k, top_p, LEVEL: tl.constexpr,
):
    """-> i64 (the first LEVEL digits of the key at which top_k or top_p is reached, or -1; the tokens and the
    mass before that prefix; the tokens with it)."""
    prefix, count_before, mass_before, num_here = r * 0, r * 0, r * 0, r * 0
    # The prefix of the level before.
    if LEVEL > 1:
        prefix = tl.load(state + (3 * LEVEL - 3) * R + r)
        count_before, mass_before = tl.load(state + (3 * LEVEL - 2) * R + r), tl.load(state + (3 * LEVEL - 1) * R + r)
    # Its histogram over all parts, and the digit at which a limit is reached.
    if LEVEL > 0:
        digit = tl.arange(0, BINS)
        count, mass = tl.zeros((BINS,), tl.int64), tl.zeros((BINS,), tl.int64)
        place = (((LEVEL - 1) * R + r) * num_parts) * BINS + digit
        for _ in range(num_parts):
            count += tl.load(counts + place)
            mass += tl.load(masses + place)
            place += BINS
        count_after, mass_after = count_before + tl.cumsum(count, 0), mass_before + tl.cumsum(mass, 0)
        found = tl.min(tl.where((count_after >= top_k) | (mass_after >= top_p), digit, BINS), 0)
        is_it = digit == found
        num_here = tl.sum(tl.where(is_it, count, 0), 0)
        count_before += tl.sum(tl.where(digit < found, count, 0), 0)
        mass_before += tl.sum(tl.where(digit < found, mass, 0), 0)
        width: tl.constexpr = 7 if LEVEL == LEVELS else 8
        prefix = tl.where((prefix >= 0) & (found < BINS), (prefix << width) | found, -1)
    return prefix, count_before, mass_before, num_here


@triton.jit(do_not_specialize=["R", "num_chunks", "top_k", "top_p"])
def sample_digit_kernel(
    counts,  # i32[LEVELS, R, num_parts, BINS]
    masses,  # i64[LEVELS, R, num_parts, BINS]
    state,  # i64[LEVELS, 3, R]
    logits,  # f32[R, V], rows `stride` apart
    partials,  # f32[3, num_chunks, R]
    R, V, stride, num_chunks, top_k, top_p,
    LEVEL: tl.constexpr, CHUNKS: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):
    """Adds to counts and masses [LEVEL, r, part] the histogram of the next digit, over the part's tokens with
    the prefix so far."""
    # The prefix so far; part 0 stores it for the next level.
    r, part, num_parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    prefix, count_before, mass_before, _ = descend(counts, masses, state, r, R, num_parts, top_k, top_p, LEVEL)
    if LEVEL > 0 and part == 0:
        tl.store(state + 3 * LEVEL * R + r, prefix)
        tl.store(state + (3 * LEVEL + 1) * R + r, count_before)
        tl.store(state + (3 * LEVEL + 2) * R + r, mass_before)
    highest, log_sum = row_sums(partials, r, R, num_chunks, CHUNKS)
    shift: tl.constexpr = 0 if LEVEL == LEVELS - 1 else 23 - 8 * LEVEL
    width: tl.constexpr = 7 if LEVEL == LEVELS - 1 else 8
    # The histogram of the part.
    own = ((LEVEL * R + r) * num_parts + part) * BINS
    for first in range(part * SPLIT, tl.minimum(V, part * SPLIT + SPLIT), BLOCK):
        v = first + tl.arange(0, BLOCK)
        logprob = tl.load(logits + r * stride + v, mask=v < V, other=0.0) - highest - log_sum
        key = order_key(logprob)
        is_in = (v < V) & ((key >> (shift + width)) == prefix)
        digit = (key >> shift) & ((1 << width) - 1)
        mass = mass_of(logprob)
        tl.atomic_add(counts + own + digit, 1, mask=is_in, sem="relaxed")
        tl.atomic_add(masses + own + digit, mass, mask=is_in & (mass > 0), sem="relaxed")


@triton.jit(do_not_specialize=["R", "num_chunks", "top_k", "top_p"])
def sample_kept_kernel(
    scores,  # f64[num_parts, R]: the best score of the part
    tokens,  # i32[num_parts, R]: its token
    picks,  # f32[num_parts, R]: its logit
    lowest,  # f32[num_parts, R]: the lowest logit of the part, -inf if one is NaN
    kept,  # i64[2, num_parts, R]: the number and the mass of the kept tokens
    counts,  # i32[LEVELS, R, num_parts, BINS]
    masses,  # i64[LEVELS, R, num_parts, BINS]
    state,  # i64[LEVELS, 3, R]
    logits,  # f32[R, V], rows `stride` apart
    partials,  # f32[3, num_chunks, R]
    keys,  # i64[R]
    positions,  # i64[R]
    R, V, stride, num_chunks, top_k, top_p, log_min_p,
    HAS_DIGITS: tl.constexpr, CHUNKS: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):
    """Draws each part's winner among the kept tokens."""
    r, part, num_parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    highest, log_sum = row_sums(partials, r, R, num_chunks, CHUNKS)
    # The cut: keys below `limit` are kept, and the first num_ties tokens at it; `rank` counts those of
    # earlier parts.
    limit, num_ties, rank = r * 0 - 1, r * 0, r * 0
    if HAS_DIGITS:
        limit, count_before, mass_before, num_here = descend(counts, masses, state, r, R, num_parts, top_k, top_p, LEVELS)
        mass = mass_of((limit | 0x80000000).to(tl.int32).to(tl.float32, bitcast=True))
        num_ties = tl.minimum(num_here, top_k - count_before)
        if mass > 0:
            num_ties = tl.minimum(num_ties, tl.cdiv(top_p - mass_before, mass))
        place = counts + ((LEVELS - 1) * R + r) * num_parts * BINS + (limit & 127)
        for _ in range(part):
            rank += tl.load(place)
            place += BINS
    # The draw over the part's tokens, a block at a time.
    best, token, picked = tl.full((), float("-inf"), tl.float64), r.to(tl.int32) * 0 - 1, highest * 0.0
    least = tl.full((BLOCK,), float("inf"), tl.float32)
    num_kept, mass_kept = tl.zeros((BLOCK,), tl.int64), tl.zeros((BLOCK,), tl.int64)
    key, position = tl.load(keys + r), tl.load(positions + r)
    for first in range(part * SPLIT, tl.minimum(V, part * SPLIT + SPLIT), BLOCK):
        v = first + tl.arange(0, BLOCK)
        z = tl.load(logits + r * stride + v, mask=v < V, other=0.0)
        least = tl.minimum(least, tl.where(v < V, tl.where(z == z, z, float("-inf")), float("inf")))
        logprob = z - highest - log_sum
        keep = (v < V) & (logprob >= (0.0 - log_sum) + log_min_p)
        if HAS_DIGITS:
            own = order_key(logprob)
            is_tie = (v < V) & (own == limit)
            rank_of = rank + tl.cumsum(is_tie.to(tl.int64), 0)  # counted from 1
            keep = keep & ((limit < 0) | (own < limit) | (is_tie & (rank_of <= num_ties)))
            rank += tl.sum(is_tie.to(tl.int64), 0)
        num_kept += keep.to(tl.int64)
        mass_kept += tl.where(keep, mass_of(logprob), 0)
        w0, w1, w2, w3 = philox_words(key, position, first // 4 + tl.arange(0, BLOCK // 4))
        word = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
        score = tl.where(keep, z.to(tl.float64) + gumbel(word).to(tl.float64), float("-inf"))
        highest_score, i = tl.max(score, 0, return_indices=True)
        is_better = highest_score > best
        best, token = tl.where(is_better, highest_score, best), tl.where(is_better, first + i, token)
        picked = tl.where(is_better, tl.sum(tl.where(v == first + i, z, 0.0), 0), picked)
    # The winner of the part.
    place = part.to(tl.int64) * R + r
    tl.store(scores + place, best)
    tl.store(tokens + place, token)
    tl.store(picks + place, picked)
    tl.store(lowest + place, tl.min(least, 0))
    tl.store(kept + place, tl.sum(num_kept, 0))
    tl.store(kept + num_parts.to(tl.int64) * R + place, tl.sum(mass_kept, 0))


def new_winners(num: int, num_rows: int, device: torch.device) -> list[torch.Tensor]:
    """-> empty scores f64, tokens i32, logits f32, lowest logits f32, [num, R] each."""
    dtypes = (torch.float64, torch.int32, torch.float32, torch.float32)
    return [torch.empty(num, num_rows, dtype=dtype, device=device) for dtype in dtypes]


def draw_kept(
    logits: torch.Tensor, vocab_size: int, partials: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor, cut: CutSpec,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """-> (the winners of the parts, as sample_merge_kernel takes them; kept i64[2, parts, R])."""
    (num_rows, stride), num_chunks, device = logits.shape, partials.shape[1], logits.device
    chunks = triton.next_power_of_2(num_chunks)
    num_parts, has_digits = triton.cdiv(vocab_size, SPLIT), cut.top_k < OFF or cut.top_p < OFF
    winners, kept = new_winners(num_parts, num_rows, device), torch.empty(2, num_parts, num_rows, dtype=torch.int64, device=device)
    # The digits of the cut, one launch each.
    counts = masses = state = None
    if has_digits:
        shape = (LEVELS.value, num_rows, num_parts, BINS.value)
        counts, masses = (torch.zeros(shape, dtype=dtype, device=device) for dtype in (torch.int32, torch.int64))
        state = torch.empty(LEVELS.value, 3, num_rows, dtype=torch.int64, device=device)
        for level in range(LEVELS.value):
            sample_digit_kernel[(num_rows, num_parts)](
                counts, masses, state, logits, partials, num_rows, vocab_size, stride, num_chunks, cut.top_k, cut.top_p,
                LEVEL=level, CHUNKS=chunks, **CONFIG)
    # The draw.
    sample_kept_kernel[(num_rows, num_parts)](
        *winners, kept, counts, masses, state, logits, partials, keys, positions, num_rows, vocab_size, stride, num_chunks,
        cut.top_k, cut.top_p, cut.log_min_p, HAS_DIGITS=has_digits, CHUNKS=chunks, **CONFIG)
    return winners, kept


def cut_compiles() -> list[Compile]:
    f32, found = pointer(torch.float32), []
    sizes: dict[str, Any] = {"R": "i32", "V": "i32", "stride": "i32", "num_chunks": "i32", "top_k": "i64", "top_p": "i64"}
    places = {"counts": "*i32", "masses": "*i64", "state": "*i64", "logits": f32, "partials": f32}
    found.append(Compile("sample_digit", torch.float32, sample_digit_kernel, places | sizes,
                         CONFIG | {"LEVEL": LEVELS.value - 1, "CHUNKS": MAX_CHUNKS}))
    arguments = {"scores": "*fp64", "tokens": "*i32", "picks": f32, "lowest": f32, "kept": "*i64", **places, "keys": "*i64",
                 "positions": "*i64", **sizes, "log_min_p": "fp32"}
    found.append(Compile("sample_kept", torch.float32, sample_kept_kernel, arguments,
                         CONFIG | {"HAS_DIGITS": True, "CHUNKS": MAX_CHUNKS}))
    return found
