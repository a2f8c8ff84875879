"""`SegmentPlan`: the segments of a pack and the tables derived from them, built once per pack and used by
every layer.

A segment (start, length, prefix_start, prefix_length) attends to all of its prefix, then causally to itself.
Key tiles count from the start of the prefix, then from the start of the segment. The paged cache has the same
layout, as a completion starts on a fresh block. So training and decode sum over the same keys in the same
order, tile by tile.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from kernels.attention import tiles
from kernels.checks import describe

BLOCK_SIZE = 16
"""Tokens per KV block."""
QUERY_STEP = 32
"""The reference pads lengths to multiples of this, and computes segments of equal padded lengths together."""
MAX_SCORES = 1 << 23
"""Most query-key pairs per head that the reference computes together; bounds the memory of its scores."""


@dataclass(frozen=True)
class Chunk:
    """Segments of similar sizes, padded to M queries, M own keys and P prefix keys."""

    own_index: torch.Tensor
    """i64[S', M]: packed rows; padding is row T, which is zero."""
    own_mask: torch.Tensor
    """bool[S', M, M]: True where the query may see the own key."""
    prefix_index: torch.Tensor
    """i64[S', P]; P = 0 for segments without a prefix."""
    prefix_mask: torch.Tensor
    """bool[S', P]"""


@dataclass(frozen=True)
class SegmentPlan:
    num_tokens: int
    segments: torch.Tensor
    """i32[S, 4] on the CPU, checked. The native kernel needs nothing else."""
    device: torch.device
    _made: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def tables(self, repeat: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> tiles.Tables:
        """For the Triton kernels: built and moved to `device` at the first layer, then reused."""
        key = (repeat, num_kv_heads, head_dim, dtype, device)
        if key not in self._made:
            self._made[key] = tiles.move(tiles.make_tables(self.segments, repeat, num_kv_heads, head_dim, dtype), device)
        made: tiles.Tables = self._made[key]
        return made

    def cu_seqlens(self, device: torch.device) -> torch.Tensor:
        """For flash-attn: i32[S + 1], the start of each segment and the end of the last."""
        if device not in self._made:
            self._made[device] = torch.cat((self.segments[:, 0], torch.tensor([self.num_tokens], dtype=torch.int32))).to(device)
        made: torch.Tensor = self._made[device]
        return made

    @cached_property
    def chunks(self) -> tuple[Chunk, ...]:
        """For the reference: the segments in batches, on `device`."""
        return tuple(Chunk(*(tensor.to(self.device) for tensor in vars(chunk).values())) for chunk in self._chunks)

    @cached_property
    def output_index(self) -> torch.Tensor:
        """For the reference: i64[T], the position of each packed row in the concatenated outputs of the
        chunks."""
        index = torch.zeros(self.num_tokens, dtype=torch.int64)
        offset = 0
        for chunk in self._chunks:
            slots = offset + torch.arange(chunk.own_index.numel()).view_as(chunk.own_index)
            real = chunk.own_index < self.num_tokens
            index[chunk.own_index[real]] = slots[real]
            offset += chunk.own_index.numel()
        return index.to(self.device)

    @cached_property
    def _chunks(self) -> list[Chunk]:
        table = self.segments.long()
        queries, prefixes = (-(-table[:, column] // QUERY_STEP) * QUERY_STEP for column in (1, 3))
        buckets: dict[tuple[int, int], list[int]] = {}
        for row, size in enumerate(zip(queries.tolist(), prefixes.tolist(), strict=True)):
            buckets.setdefault(size, []).append(row)
        chunks = []
        for (num_queries, num_prefix), rows in sorted(buckets.items()):
            per_chunk = max(1, MAX_SCORES // (num_queries * (num_queries + num_prefix)))
            for first in range(0, len(rows), per_chunk):
                chunks.append(_chunk(table[rows[first : first + per_chunk]], num_queries, num_prefix, self.num_tokens))
        return chunks


def check_segments(segments: torch.Tensor, num_tokens: int) -> None:
    """Raises unless segments are i32[S, 4] on the CPU, tile [0, T) in order, and each prefix lies before its
    segment."""
    if segments.dtype != torch.int32 or segments.dim() != 2 or segments.shape[1] != 4 or segments.device.type != "cpu":
        raise ValueError(f"attention: segments must be i32[S, 4] on cpu, got {describe(segments)}")
    position = 0
    for row, (start, length, prefix_start, prefix_length) in enumerate(segments.tolist()):
        if start != position or length < 1:
            raise ValueError(f"attention: segments must tile the pack: row {row} must start at {position} with length >= 1, "
                             f"got start {start}, length {length}")
        if prefix_length < 0 or (prefix_length and not 0 <= prefix_start <= start - prefix_length):
            raise ValueError(f"attention: the prefix of segment {row} must lie in [0, {start}), "
                             f"got start {prefix_start}, length {prefix_length}")
        position += length
    if position != num_tokens:
        raise ValueError(f"attention: segments cover {position} tokens, the pack holds {num_tokens}")


def plan_segments(segments: torch.Tensor, num_tokens: int, device: torch.device | str = "cpu") -> SegmentPlan:
    """segments i32[S, 4] on the CPU -> the plan; its tensors are built on `device` at their first use."""
    check_segments(segments, num_tokens)
    return SegmentPlan(num_tokens, segments.contiguous(), torch.device(device))


def _chunk(table: torch.Tensor, num_queries: int, num_prefix: int, num_tokens: int) -> Chunk:
    start, own, prefix_start, prefix = (column[:, None] for column in table.unbind(1))  # i64[S', 1] each
    place = torch.arange(num_queries)[None]
    own_index = torch.where(place < own, start + place, num_tokens)
    own_mask = (place[:, None, :] <= place[:, :, None]) & (place < own)[:, None, :]
    place = torch.arange(num_prefix)[None]
    prefix_mask = place < prefix
    return Chunk(own_index, own_mask, torch.where(prefix_mask, prefix_start + place, num_tokens), prefix_mask)
