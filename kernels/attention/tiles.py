"""How the GPU's attention is cut: the sizes of its tiles, and the host's list of who computes what in a pack.

The sizes follow from head dim, dtype and architecture alone. Lists are made once a pack, on the CPU, and go to the device in one
copy: no layer waits for the device. Used by function.py; torch alone, so that it can be read and tested without triton.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from kernels.triton_ops import IS_INTERPRETED

MIN_CHUNK = 64
"""Tiles of query rows that one program of the backward at least walks before its sums are worth a round trip through memory."""
NUM_UNITS = 1024
"""About how many programs of the backward over keys a pack is cut into, where some keys have very many readers: 8 for each
multiprocessor of a large GPU. It bounds the memory of their sums too: 1024 * BLOCK_N * C * 8 bytes."""


WIDE = (torch.bfloat16, torch.float32) if IS_INTERPRETED else (torch.bfloat16,)
"""The dtypes with tiles for the matrix units. Interpreted programs cost by their number: there f32 takes these too."""


def padded_head(head_dim: int) -> int:
    """A matrix unit's tile has a power of two of columns, 16 at least; what is past the head dim counts as 0."""
    return max(16, 1 << (head_dim - 1).bit_length())


def forward_config(head_dim: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile and launch of the packed forward. BLOCK_N is also the paged one's."""
    columns = padded_head(head_dim)
    if dtype in WIDE:
        return {"BLOCK_M": 128, "BLOCK_N": 64 if columns <= 128 else 32, "BLOCK_C": columns, "num_warps": 8, "num_stages": 3}
    return {"BLOCK_M": 64, "BLOCK_N": 32 if columns <= 64 else 16, "BLOCK_C": columns, "num_warps": 8, "num_stages": 2}


def paged_config(head_dim: int, dtype: torch.dtype, repeat: int, capability: int) -> dict[str, int]:
    """The forward's, so that a row is summed in the same order. Where a warpgroup multiplies 64 rows (sm_90, sm_100), one of them
    does that too, in half the work; elsewhere Triton lays a row's columns over the warps by the shape of the tile."""
    config = forward_config(head_dim, dtype)
    if dtype in WIDE and config["BLOCK_C"] <= 128 and capability // 10 in (9, 10) and repeat <= 64:
        config |= {"BLOCK_M": 64, "num_warps": 4}
    if repeat > config["BLOCK_M"]:
        raise ValueError(f"paged_attention: at most {config['BLOCK_M']} heads can share a kv head here, got {repeat}")
    return config


def query_config(head_dim: int, dtype: torch.dtype) -> dict[str, int]:
    """Of the backward over queries, dq. BLOCK_M divides the forward's, whose list of tiles it goes by."""
    columns = padded_head(head_dim)
    if columns <= 128:
        return forward_config(head_dim, dtype)
    if dtype in WIDE:
        return {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_C": columns, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_M": 32, "BLOCK_N": 16, "BLOCK_C": columns, "num_warps": 8, "num_stages": 2}


def key_config(head_dim: int, dtype: torch.dtype) -> dict[str, int]:
    """Of the backward over keys, dk and dv."""
    columns = padded_head(head_dim)
    if dtype in WIDE:
        return {"BLOCK_M": 64 if columns <= 128 else 32, "BLOCK_N": 128 if columns <= 128 else 64, "BLOCK_C": columns,
                "num_warps": 8, "num_stages": 2}
    return {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_C": columns, "num_warps": 8, "num_stages": 2}


class Tables(NamedTuple):
    """i32 all, on the device."""

    tiles: torch.Tensor
    """[N, 5]: query rows from `first row` of a segment on: start, length, prefix_start, prefix_length, first row. Row r is head
    r % (H / K) of a kv head's, r // (H / K) tokens on. The longest work first, so that the last to start are short."""
    parts: torch.Tensor
    """[P, 4]: key_start, num_keys, first reader, past the last: a key tile whose readers are too many for one program, in parts
    that neighbour each other, in their order."""
    wholes: torch.Tensor
    """[U, 4]: the same for tiles that one program does, the longest work first."""
    readers: torch.Tensor
    """[Q, 6]: start, length, first tile of query rows, past the last, first key seen, past the last (places in the pack)."""
    merges: torch.Tensor
    """[M, 4]: key_start, num_keys, first part, past the last."""


def make_tables(segments: torch.Tensor, repeat: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> Tables:
    """segments i32[S, 4], checked -> the tables, on the CPU."""
    table, keys = segments.long(), key_config(head_dim, dtype)
    tiles = _query_tiles(table, repeat, forward_config(head_dim, dtype)["BLOCK_M"])
    rest = _key_tables(table, repeat, num_kv_heads, keys["BLOCK_M"], keys["BLOCK_N"])
    return Tables(*(x.int() for x in (tiles, *rest)))


def move(tables: Tables, device: torch.device) -> Tables:
    """In one copy, which nobody waits for."""
    if device == tables.tiles.device:
        return tables
    flat = torch.cat([x.flatten() for x in tables])
    flat = (flat.pin_memory() if device.type == "cuda" else flat).to(device, non_blocking=True)
    parts = flat.split([x.numel() for x in tables])
    return Tables(*(part.view(x.shape) for part, x in zip(parts, tables, strict=True)))


def _counted(counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[2, 3] -> ([0, 0, 1, 1, 1], [0, 1, 0, 1, 2]): each entry's number, repeated, and the place within it."""
    owner = torch.repeat_interleave(counts)
    return owner, torch.arange(len(owner)) - (counts.cumsum(0) - counts)[owner]


def _query_tiles(table: torch.Tensor, repeat: int, block_rows: int) -> torch.Tensor:
    owner, place = _counted(-(-table[:, 1] * repeat // block_rows))
    rows = table[owner]
    seen = rows[:, 3] + torch.minimum((place + 1) * block_rows // repeat, rows[:, 1])
    tiles = torch.cat((rows, (place * block_rows)[:, None]), 1)
    return tiles[seen.argsort(descending=True, stable=True)]


class _Readers(NamedTuple):
    """Who reads which key tile, sorted by tile, then in the pack's order; i64 all."""

    tile: torch.Tensor
    segment: torch.Tensor
    first: torch.Tensor
    """The first of the segment's tiles of rows that sees the keys."""
    num_tiles: torch.Tensor
    """How many do."""
    see: torch.Tensor
    """[Q, 2]: first place seen, and past the last."""


def _find_readers(table: torch.Tensor, repeat: int, block_rows: int, block_keys: int, owner: torch.Tensor, place: torch.Tensor,
                  first_tile: torch.Tensor) -> _Readers:
    """A key tile (number `place` of segment `owner`) is read by its segment, from its first key's own row on, and by each segment
    whose prefix overlaps it, with all rows."""
    start, length, prefix_start, prefix_length = (column.contiguous() for column in table.unbind(1))
    prefixed = prefix_length.nonzero().flatten()
    begin, end = prefix_start[prefixed], (prefix_start + prefix_length)[prefixed]

    def tile_of(token: torch.Tensor) -> torch.Tensor:
        holder = torch.searchsorted(start, token, right=True) - 1
        return first_tile[holder] + (token - start[holder]) // block_keys

    number, step = _counted(tile_of(end - 1) - tile_of(begin) + 1)
    tile = torch.cat((torch.arange(len(owner)), tile_of(begin)[number] + step))
    order = tile.argsort(stable=True)  # a segment stands before those that read it
    segment = torch.cat((owner, prefixed[number]))[order]
    first = torch.cat((place * block_keys * repeat // block_rows, torch.zeros_like(number)))[order]
    see = torch.cat((torch.stack((start, start + length), 1)[owner], torch.stack((begin, end), 1)[number]))[order]
    return _Readers(tile[order], segment, first, -(-length * repeat // block_rows)[segment] - first, see)


def _key_tables(table: torch.Tensor, repeat: int, num_kv_heads: int, block_rows: int, block_keys: int) -> tuple[torch.Tensor, ...]:
    """-> parts, wholes, readers, merges: each key tile's readers, cut where they add up to a chunk of row tiles."""
    start, length = table[:, 0], table[:, 1]
    num_tiles = -(-length // block_keys)
    owner, place = _counted(num_tiles)
    found = _find_readers(table, repeat, block_rows, block_keys, owner, place, num_tiles.cumsum(0) - num_tiles)
    chunk = max(MIN_CHUNK, -(-int(found.num_tiles.sum()) * num_kv_heads // NUM_UNITS))
    total = torch.zeros(len(owner), dtype=torch.int64).index_add_(0, found.tile, found.num_tiles)
    before = found.num_tiles.cumsum(0) - found.num_tiles - (total.cumsum(0) - total)[found.tile]  # among its tile's row tiles
    after = before + found.num_tiles
    piece, step = _counted((after - 1) // chunk - before // chunk + 1)  # of a reader, the pieces in different chunks
    number = (before // chunk)[piece] + step
    low = torch.maximum(number * chunk, before[piece]) - before[piece] + found.first[piece]
    high = torch.minimum((number + 1) * chunk, after[piece]) - before[piece] + found.first[piece]
    segment = found.segment[piece]
    readers = torch.stack((start[segment], length[segment], low, high, *found.see[piece].unbind(1)), 1)
    num_units = -(-total // chunk)  # of each key tile: at least 1, since its own segment reads it
    unit = (num_units.cumsum(0) - num_units)[found.tile[piece]] + number
    reader_end = torch.bincount(unit, minlength=int(num_units.sum())).cumsum(0)
    first_reader = torch.cat((reader_end.new_zeros(1), reader_end))[:-1]
    tile, _ = _counted(num_units)
    keys = torch.stack((start[owner] + place * block_keys, (length[owner] - place * block_keys).clamp(max=block_keys)), 1)
    units = torch.cat((keys[tile], first_reader[:, None], reader_end[:, None]), 1)
    is_part = num_units > 1
    past = num_units[is_part].cumsum(0)
    merges = torch.cat((keys[is_part], (past - num_units[is_part])[:, None], past[:, None]), 1)
    wholes = units[~is_part[tile]][total[~is_part].argsort(descending=True, stable=True)]
    return units[is_part[tile]], wholes, readers, merges
