"""`Pages`: where each decoding row's keys stand in the paged cache, worked out once a step and used by every layer.

The rows of a group name one prefix. They are laid side by side ("slots"), so that a prefix's keys are read once for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.attention.plan import BLOCK_SIZE
from kernels.checks import check


@dataclass(frozen=True)
class KeySet:
    """The keys of some readers (prefixes, or rows), in whole blocks."""

    block_index: torch.Tensor
    """i64[readers * K * NB]: rows of the cache seen as [K * num_blocks, BLOCK_SIZE * C]."""
    mask: torch.Tensor
    """bool[readers, 1, 1, NB * BLOCK_SIZE]: True where there is a key."""


@dataclass(frozen=True)
class Pages:
    num_rows: int
    num_kv_heads: int
    num_blocks: int
    num_prefixes: int
    group_size: int
    """Most rows of one prefix, G."""
    slots: torch.Tensor
    """i64[R]: row r's place among the num_prefixes * G slots."""
    prefix: KeySet
    own: KeySet


def plan_pages(
    *, prefix_table: torch.Tensor, prefix_lens: torch.Tensor, prefix_index: torch.Tensor, own_table: torch.Tensor,
    own_lens: torch.Tensor, num_kv_heads: int, num_blocks: int,
) -> Pages:
    """Prefix b has prefix_lens[b] keys in the blocks prefix_table[b] (i64[B, NP]); row r reads prefix prefix_index[r] (i64[R]),
    then own_lens[r] >= 1 keys in the blocks own_table[r] (i64[R, NO]). Tables are padded with any block of the cache."""
    op = "plan_pages"
    check(op, "own_table", own_table, ("R", "NO"), torch.int64)
    check(op, "prefix_table", prefix_table, ("B", "NP"), torch.int64, like=own_table)
    num_rows, num_prefixes = own_table.shape[0], prefix_table.shape[0]
    check(op, "prefix_lens", prefix_lens, (num_prefixes,), torch.int64, like=own_table)
    check(op, "prefix_index", prefix_index, (num_rows,), torch.int64, like=own_table)
    check(op, "own_lens", own_lens, (num_rows,), torch.int64, like=own_table)
    order = torch.sort(prefix_index, stable=True).indices
    counts = torch.bincount(prefix_index, minlength=num_prefixes)
    group_size = int(counts.max()) if num_rows else 0
    rank = torch.arange(num_rows, device=order.device) - (counts.cumsum(0) - counts).index_select(0, prefix_index[order])
    slots = torch.empty_like(order).index_copy_(0, order, prefix_index[order] * group_size + rank)
    return Pages(
        num_rows, num_kv_heads, num_blocks, num_prefixes, group_size, slots,
        _key_set(prefix_table, prefix_lens, num_kv_heads, num_blocks), _key_set(own_table, own_lens, num_kv_heads, num_blocks))


def _key_set(table: torch.Tensor, lens: torch.Tensor, num_kv_heads: int, num_blocks: int) -> KeySet:
    heads = torch.arange(num_kv_heads, device=table.device)[None, :, None] * num_blocks
    place = torch.arange(table.shape[1] * BLOCK_SIZE, device=table.device)
    return KeySet((heads + table[:, None, :]).flatten(), (place[None] < lens[:, None])[:, None, None])
