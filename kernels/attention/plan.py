"""`SegmentPlan`: where each segment's queries and keys stand, worked out once per pack and used by every layer.

A segment (start, length, prefix_start, prefix_length) attends to all of its prefix, then causally to itself. Its keys are
laid out as [prefix, padded to whole blocks | own], which is also how the paged cache holds them: a completion starts on
a fresh block. So training and decoding sum over the same keys in the same places, key tile by key tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.checks import describe

BLOCK_SIZE = 16
"""Tokens in one KV block."""
QUERY_STEP = 32
"""Segments whose padded lengths agree to this step are computed together."""
MAX_SCORES = 1 << 23
"""Query-key pairs computed together, per head: bounds the memory of the reference's scores."""


def ceil_to(value: int, step: int) -> int:
    return -(-value // step) * step


@dataclass(frozen=True)
class Chunk:
    """Segments of alike sizes, padded to M queries and J keys."""

    query_index: torch.Tensor
    """i64[S', M]: packed rows; padding points at row T, which is zero."""
    key_index: torch.Tensor
    """i64[S', J]"""
    mask: torch.Tensor
    """bool[S', M, J]: True where the query may see the key."""


@dataclass(frozen=True)
class SegmentPlan:
    num_tokens: int
    chunks: tuple[Chunk, ...]
    output_index: torch.Tensor
    """i64[T]: for each packed row, its place among the chunks' outputs laid end to end."""


def check_segments(segments: torch.Tensor, num_tokens: int) -> None:
    """i32[S, 4] on the CPU; the segments tile [0, T) in order, and each prefix lies wholly before its segment."""
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
    """segments i32[S, 4] on the CPU -> the plan, its tensors on `device`."""
    check_segments(segments, num_tokens)
    table = segments.long()
    own, prefix = table[:, 1], table[:, 3]
    padded_prefix = (prefix + BLOCK_SIZE - 1) // BLOCK_SIZE * BLOCK_SIZE
    num_queries = (own + QUERY_STEP - 1) // QUERY_STEP * QUERY_STEP
    num_keys = (padded_prefix + own + QUERY_STEP - 1) // QUERY_STEP * QUERY_STEP
    buckets: dict[tuple[int, int], list[int]] = {}
    for row, size in enumerate(zip(num_queries.tolist(), num_keys.tolist(), strict=True)):
        buckets.setdefault(size, []).append(row)

    chunks = []
    output_index = torch.zeros(num_tokens, dtype=torch.int64)
    offset = 0
    for (queries, keys), rows in sorted(buckets.items()):
        per_chunk = max(1, MAX_SCORES // (queries * keys))
        for first in range(0, len(rows), per_chunk):
            part = table[rows[first : first + per_chunk]]
            chunk = _chunk(part, padded_prefix[rows[first : first + per_chunk]], queries, keys, num_tokens)
            slots = offset + torch.arange(chunk.query_index.numel()).view_as(chunk.query_index)
            real = chunk.query_index < num_tokens
            output_index[chunk.query_index[real]] = slots[real]
            offset += chunk.query_index.numel()
            chunks.append(Chunk(chunk.query_index.to(device), chunk.key_index.to(device), chunk.mask.to(device)))
    return SegmentPlan(num_tokens, tuple(chunks), output_index.to(device))


def _chunk(table: torch.Tensor, padded_prefix: torch.Tensor, num_queries: int, num_keys: int, num_tokens: int) -> Chunk:
    start, own, prefix_start, prefix = (column[:, None] for column in table.unbind(1))  # i64[S', 1] each
    query = torch.arange(num_queries)[None]
    query_index = torch.where(query < own, start + query, num_tokens)
    place = torch.arange(num_keys)[None]
    own_place = place - padded_prefix[:, None]
    in_prefix, in_own = place < prefix, (own_place >= 0) & (own_place < own)
    key_index = torch.where(in_prefix, prefix_start + place, torch.where(in_own, start + own_place, num_tokens))
    causal = own_place[:, None, :] <= query[:, :, None]
    mask = in_prefix[:, None, :] | (in_own[:, None, :] & causal)
    return Chunk(query_index, key_index, mask)
