"""Sorts the (token, choice) pairs by expert on a GPU, and cuts each expert's rows into tiles: two launches,
no device sync.

A stable counting sort, so that an expert's rows are in order of token. The pairs are split into at most
MAX_CHUNKS chunks, one program each. count_kernel counts each chunk's pairs by expert. place_kernel adds up
the counts of earlier experts and earlier chunks, which gives the rows of its pairs, and writes a part of the
tiles. All arithmetic is on integers, so the result does not depend on the split.

Only the device has the number of tiles, so a product launches as many as there could be; unused ones have
expert -1 and return at once. A pair with an invalid expert gets row -1, and its token becomes NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels.ahead_of_time import Compile

MAX_CHUNKS = 128
CHUNKS_AT_ONCE = tl.constexpr(16)
TILES_AT_ONCE = tl.constexpr(16)


class Plan(NamedTuple):
    pairs: torch.Tensor
    """i32[T * k]: token * k + choice of each row; rows are sorted by expert."""
    rows: torch.Tensor
    """i32[T * k]: the row of each pair."""
    bounds: torch.Tensor
    """i32[E + 1]: expert e has the rows bounds[e]..bounds[e + 1] - 1."""
    tiles: torch.Tensor
    """i32[3, tiles]: expert (-1: unused), first row, end of the expert's rows."""


@triton.jit
def experts_of(expert_ids, pair, num_pairs, E):
    """-> the expert of each pair, i32; -1 past the last pair and for an invalid expert."""
    expert = tl.load(expert_ids + pair, mask=pair < num_pairs, other=-1)
    return tl.where((expert >= 0) & (expert < E), expert, -1).to(tl.int32)


@triton.jit(do_not_specialize=["num_pairs", "chunk_size"])
def count_kernel(
    counts,  # i32[chunks, E]
    expert_ids,  # i64[T * k]
    num_pairs, chunk_size, E, BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr,
):
    chunk, e = tl.program_id(0), tl.arange(0, BLOCK_E)
    total = tl.zeros((BLOCK_E,), tl.int32)
    for start in range(0, chunk_size, BLOCK_P):
        expert = experts_of(expert_ids, chunk * chunk_size + start + tl.arange(0, BLOCK_P), num_pairs, E)
        total += tl.sum((expert[:, None] == e[None, :]).to(tl.int32), axis=0)
    tl.store(counts + chunk * E + e, total, mask=e < E)


@triton.jit(do_not_specialize=["num_pairs", "chunk_size", "num_chunks", "num_tiles"])
def place_kernel(
    pairs,  # i32[T * k]
    rows,  # i32[T * k]
    bounds,  # i32[E + 1]
    tiles,  # i32[3, num_tiles]
    expert_ids,  # i64[T * k]
    counts,  # i32[chunks, E]
    num_pairs, chunk_size, num_chunks, num_tiles, E,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr,
):
    # Rows of each expert, and those in earlier chunks.
    chunk, e = tl.program_id(0), tl.arange(0, BLOCK_E)
    total, before = tl.zeros((BLOCK_E,), tl.int32), tl.zeros((BLOCK_E,), tl.int32)
    for start in range(0, num_chunks, CHUNKS_AT_ONCE):
        other = (start + tl.arange(0, CHUNKS_AT_ONCE))[:, None]
        count = tl.load(counts + other * E + e[None, :], mask=(other < num_chunks) & (e[None, :] < E), other=0)
        total += tl.sum(count, axis=0)
        before += tl.sum(tl.where(other < chunk, count, 0), axis=0)
    end = tl.cumsum(total, axis=0)
    if chunk == 0:
        tl.store(bounds + e, end - total, mask=e < E)
        tl.store(bounds + E, tl.sum(total, axis=0))

    # The rows of this chunk's pairs.
    next_row = end - total + before
    for start in range(0, chunk_size, BLOCK_P):
        pair = chunk * chunk_size + start + tl.arange(0, BLOCK_P)
        expert = experts_of(expert_ids, pair, num_pairs, E)
        is_mine = (expert[:, None] == e[None, :]).to(tl.int32)
        row = tl.sum(is_mine * (next_row[None, :] + tl.cumsum(is_mine, axis=0) - 1), axis=1)
        tl.store(rows + pair, tl.where(expert >= 0, row, -1), mask=pair < num_pairs)
        tl.store(pairs + row, pair, mask=expert >= 0)
        next_row += tl.sum(is_mine, axis=0)

    # A part of the tiles.
    needed = tl.cdiv(total, BLOCK_M)
    last_tile = tl.cumsum(needed, axis=0)
    origin = end - total - (last_tile - needed) * BLOCK_M  # tile t of an expert begins at origin + t * BLOCK_M
    for start in range(chunk * TILES_AT_ONCE, num_tiles, num_chunks * TILES_AT_ONCE):
        tile = start + tl.arange(0, TILES_AT_ONCE)
        expert = tl.sum((last_tile[None, :] <= tile[:, None]).to(tl.int32), axis=1)
        is_mine = expert[:, None] == e[None, :]
        tl.store(tiles + tile, tl.where(expert < E, expert, -1), mask=tile < num_tiles)
        first_row = tl.sum(tl.where(is_mine, origin[None, :], 0), axis=1) + tile * BLOCK_M
        tl.store(tiles + num_tiles + tile, first_row, mask=tile < num_tiles)
        tl.store(tiles + 2 * num_tiles + tile, tl.sum(tl.where(is_mine, end[None, :], 0), axis=1), mask=tile < num_tiles)


def config(num_experts: int) -> dict[str, int]:
    width = triton.next_power_of_2(num_experts)
    return {"BLOCK_P": min(128, max(1, 4096 // width)), "BLOCK_E": width, "num_warps": 8}


def make_plan(expert_ids: torch.Tensor, num_experts: int, block_m: int) -> Plan:
    """expert_ids i64[T, k], T * k > 0."""
    num_pairs, device = expert_ids.numel(), expert_ids.device
    chosen = config(num_experts)
    chunk_size = triton.cdiv(triton.cdiv(num_pairs, MAX_CHUNKS), chosen["BLOCK_P"]) * chosen["BLOCK_P"]
    num_chunks = triton.cdiv(num_pairs, chunk_size)
    # Each expert with rows has at most one partial tile.
    num_tiles = num_pairs // block_m + min(num_experts, num_pairs)
    counts, pairs, rows, bounds, tiles = (torch.empty(size, dtype=torch.int32, device=device) for size in (
        (num_chunks, num_experts), (num_pairs,), (num_pairs,), (num_experts + 1,), (3, num_tiles)))
    count_kernel[(num_chunks,)](counts, expert_ids, num_pairs, chunk_size, num_experts, **chosen)
    place_kernel[(num_chunks,)](
        pairs, rows, bounds, tiles, expert_ids, counts, num_pairs, chunk_size, num_chunks, num_tiles, num_experts, BLOCK_M=block_m,
        **chosen)
    return Plan(pairs, rows, bounds, tiles)


def compiles() -> list[Compile]:
    found = []
    for num_experts in (8, 128):
        options = config(num_experts) | {"num_stages": 3}
        counted = {"num_pairs": "i32", "chunk_size": "i32"}
        written = dict.fromkeys(("pairs", "rows", "bounds", "tiles"), "*i32")
        found += [
            Compile(f"moe_count E{num_experts}", torch.int32, count_kernel,
                    {"counts": "*i32", "expert_ids": "*i64", **counted, "E": "i32"}, options),
            Compile(f"moe_place E{num_experts}", torch.int32, place_kernel,
                    {**written, "expert_ids": "*i64", "counts": "*i32", **counted, "num_chunks": "i32", "num_tiles": "i32",
                     "E": "i32"}, options | {"BLOCK_M": 128},
                    may_spill=num_experts == 128)]  # 8 bytes on sm_100
    return found
