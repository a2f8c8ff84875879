"""The tile sizes of the Triton attention kernels, and the tables that assign a pack's tiles to programs.

The sizes follow from head dim, dtype and architecture alone. The tables are built once per pack on the CPU
and moved to the device in one copy, without a sync. plan.py calls this module; it needs torch alone, so that
it can be tested without triton.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from kernels.triton_ops import IS_INTERPRETED

MIN_CHUNK = 64
"""Fewest tiles of query rows per program of the backward pass over keys: below, storing partial sums would
cost more than it gains."""
NUM_UNITS = 1024
"""Keys with very many readers are split so that the backward pass over keys has about this many programs, 8
per multiprocessor of a large GPU. It also bounds the memory of partial sums: 1024 * BLOCK_N * C * 8 bytes."""


WIDE = (torch.bfloat16, torch.float32) if IS_INTERPRETED else (torch.bfloat16,)
"""The dtypes with large tiles. The interpreter's time grows with the number of programs, so f32 takes large
tiles there too."""


def padded_head(head_dim: int) -> int:
    """The columns of a tile: a power of two, at least 16. Columns past the head dim are 0."""
    return max(16, 1 << (head_dim - 1).bit_length())


def forward_config(head_dim: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile and launch options of the packed forward pass. The paged one has the same BLOCK_N."""
    columns = padded_head(head_dim)
    if dtype in WIDE:
        return {"BLOCK_M": 128, "BLOCK_N": 64 if columns <= 128 else 32, "BLOCK_C": columns, "num_warps": 8, "num_stages": 3}
    return {"BLOCK_M": 64, "BLOCK_N": 32 if columns <= 64 else 16, "BLOCK_C": columns, "num_warps": 8, "num_stages": 2}


def paged_config(head_dim: int, dtype: torch.dtype, repeat: int, capability: int) -> dict[str, int]:
    """The forward config, so that a row is summed in the same order. On sm_90 and sm_100, where a warpgroup
    multiplies 64 rows, a tile of one warpgroup keeps that order with half the work. Elsewhere a row's layout
    over the warps depends on the tile's shape, so the tile stays."""
    config = forward_config(head_dim, dtype)
    if dtype in WIDE and config["BLOCK_C"] <= 128 and capability // 10 in (9, 10) and repeat <= 64:
        config |= {"BLOCK_M": 64, "num_warps": 4}
    if repeat > config["BLOCK_M"]:
        raise ValueError(f"paged_attention: at most {config['BLOCK_M']} heads can share a kv head here, got {repeat}")
    return config


def query_config(head_dim: int, dtype: torch.dtype) -> dict[str, int]:
    """Options of the backward pass over queries (dq). BLOCK_M divides the forward's, since both use the same
    table of tiles."""
    columns = padded_head(head_dim)
    if columns <= 128:
        return forward_config(head_dim, dtype)
    if dtype in WIDE:
        return {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_C": columns, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_M": 32, "BLOCK_N": 16, "BLOCK_C": columns, "num_warps": 8, "num_stages": 2}


def key_config(head_dim: int, dtype: torch.dtype) -> dict[str, int]:
    """Options of the backward pass over keys (dk, dv)."""
    columns = padded_head(head_dim)
    if dtype in WIDE:
        return {"BLOCK_M": 64 if columns <= 128 else 32, "BLOCK_N": 128 if columns <= 128 else 64, "BLOCK_C": columns,
                "num_warps": 8, "num_stages": 2}
    return {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_C": columns, "num_warps": 8, "num_stages": 2}


class Tables(NamedTuple):
    """The work of a pack; all i32."""

    tiles: torch.Tensor
    """[N, 5], tiles of query rows: start, length, prefix_start, prefix_length of the segment, and the tile's
    first row. Row r of a segment and kv head is query head r % (H / K) of token r // (H / K). The longest
    work comes first, so that the last programs are short."""
    parts: torch.Tensor
    """[P, 4], key tiles with too many readers for one program, split into consecutive parts: key_start,
    num_keys, and the range of its readers (first, past the last)."""
    wholes: torch.Tensor
    """[U, 4], key tiles for one program: the same columns, the longest work first."""
    readers: torch.Tensor
    """[Q, 6], segments that read a key tile: start, length, range of tiles of query rows, range of keys seen
    (positions in the pack)."""
    merges: torch.Tensor
    """[M, 4], key tiles that were split: key_start, num_keys, range of parts."""


def make_tables(segments: torch.Tensor, repeat: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> Tables:
    """Checked segments i32[S, 4] -> the tables, on the CPU."""
    table, keys = segments.long(), key_config(head_dim, dtype)
    tiles = _query_tiles(table, repeat, forward_config(head_dim, dtype)["BLOCK_M"])
    rest = _key_tables(table, repeat, num_kv_heads, keys["BLOCK_M"], keys["BLOCK_N"])
    return Tables(*(x.int() for x in (tiles, *rest)))


def move(tables: Tables, device: torch.device) -> Tables:
    """Moves the tables in one asynchronous copy."""
    if device == tables.tiles.device:
        return tables
    flat = torch.cat([x.flatten() for x in tables])
    flat = (flat.pin_memory() if device.type == "cuda" else flat).to(device, non_blocking=True)
    parts = flat.split([x.numel() for x in tables])
    return Tables(*(part.view(x.shape) for part, x in zip(parts, tables, strict=True)))


def _counted(counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[2, 3] -> ([0, 0, 1, 1, 1], [0, 1, 0, 1, 2]): the index of each entry, repeated, and a counter within
    it."""
    owner = torch.repeat_interleave(counts)
    return owner, torch.arange(len(owner)) - (counts.cumsum(0) - counts)[owner]


def _query_tiles(table: torch.Tensor, repeat: int, block_rows: int) -> torch.Tensor:
    owner, place = _counted(-(-table[:, 1] * repeat // block_rows))
    rows = table[owner]
    seen = rows[:, 3] + torch.minimum((place + 1) * block_rows // repeat, rows[:, 1])
    tiles = torch.cat((rows, (place * block_rows)[:, None]), 1)
    return tiles[seen.argsort(descending=True, stable=True)]


class _Readers(NamedTuple):
    """(key tile, reading segment) pairs, sorted by tile, then in the pack's order; all i64."""

    tile: torch.Tensor
    segment: torch.Tensor
    first: torch.Tensor
    """The segment's first tile of query rows that sees the keys."""
    num_tiles: torch.Tensor
    """The number of tiles of query rows that see them."""
    see: torch.Tensor
    """[Q, 2]: the range of keys seen."""


def _find_readers(table: torch.Tensor, repeat: int, block_rows: int, block_keys: int, owner: torch.Tensor, place: torch.Tensor,
                  first_tile: torch.Tensor) -> _Readers:
    """Key tile number `place` of segment `owner` is read by that segment, from the row of its first key on,
    and by all rows of each segment whose prefix overlaps it."""
    start, length, prefix_start, prefix_length = (column.contiguous() for column in table.unbind(1))
    prefixed = prefix_length.nonzero().flatten()
    begin, end = prefix_start[prefixed], (prefix_start + prefix_length)[prefixed]

    def tile_of(token: torch.Tensor) -> torch.Tensor:
        holder = torch.searchsorted(start, token, right=True) - 1
        return first_tile[holder] + (token - start[holder]) // block_keys

    number, step = _counted(tile_of(end - 1) - tile_of(begin) + 1)
    tile = torch.cat((torch.arange(len(owner)), tile_of(begin)[number] + step))
    order = tile.argsort(stable=True)  # a segment comes before the segments that read it
    segment = torch.cat((owner, prefixed[number]))[order]
    first = torch.cat((place * block_keys * repeat // block_rows, torch.zeros_like(number)))[order]
    see = torch.cat((torch.stack((start, start + length), 1)[owner], torch.stack((begin, end), 1)[number]))[order]
    return _Readers(tile[order], segment, first, -(-length * repeat // block_rows)[segment] - first, see)


def _key_tables(table: torch.Tensor, repeat: int, num_kv_heads: int, block_rows: int, block_keys: int) -> tuple[torch.Tensor, ...]:
    """-> parts, wholes, readers, merges. Splits the readers of each key tile into chunks of equally many row
    tiles."""
    # The readers of every key tile, in order.
    start, length = table[:, 0], table[:, 1]
    num_tiles = -(-length // block_keys)
    owner, place = _counted(num_tiles)
    found = _find_readers(table, repeat, block_rows, block_keys, owner, place, num_tiles.cumsum(0) - num_tiles)
    # Where each reader falls among the chunks of its key tile.
    chunk = max(MIN_CHUNK, -(-int(found.num_tiles.sum()) * num_kv_heads // NUM_UNITS))
    total = torch.zeros(len(owner), dtype=torch.int64).index_add_(0, found.tile, found.num_tiles)
    before = found.num_tiles.cumsum(0) - found.num_tiles - (total.cumsum(0) - total)[found.tile]  # counted within the key tile
    after = before + found.num_tiles
    piece, step = _counted((after - 1) // chunk - before // chunk + 1)  # a reader in several chunks gives several pieces
    number = (before // chunk)[piece] + step
    low = torch.maximum(number * chunk, before[piece]) - before[piece] + found.first[piece]
    high = torch.minimum((number + 1) * chunk, after[piece]) - before[piece] + found.first[piece]
    # One row per reader and chunk.
    segment = found.segment[piece]
    readers = torch.stack((start[segment], length[segment], low, high, *found.see[piece].unbind(1)), 1)
    # One row per unit: a key tile, or a chunk of its readers.
    num_units = -(-total // chunk)  # per key tile; at least 1, since its own segment reads it
    unit = (num_units.cumsum(0) - num_units)[found.tile[piece]] + number
    reader_end = torch.bincount(unit, minlength=int(num_units.sum())).cumsum(0)
    first_reader = torch.cat((reader_end.new_zeros(1), reader_end))[:-1]
    tile, _ = _counted(num_units)
    keys = torch.stack((start[owner] + place * block_keys, (length[owner] - place * block_keys).clamp(max=block_keys)), 1)
    units = torch.cat((keys[tile], first_reader[:, None], reader_end[:, None]), 1)
    # The units by kind: tiles that were split and their parts, and whole tiles.
    is_part = num_units > 1
    past = num_units[is_part].cumsum(0)
    merges = torch.cat((keys[is_part], (past - num_units[is_part])[:, None], past[:, None]), 1)
    wholes = units[~is_part[tile]][total[~is_part].argsort(descending=True, stable=True)]
    return units[is_part[tile]], wholes, readers, merges
