"""`Pages`: where each decoding row's keys stand in the paged cache, worked out once a step and used by every layer.

The rows of a group name one prefix. They are laid side by side ("slots"), so that a prefix's keys are read once for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

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
    """The tables, and what the reference makes of them when it runs."""

    prefix_table: torch.Tensor
    prefix_lens: torch.Tensor
    prefix_index: torch.Tensor
    own_table: torch.Tensor
    own_lens: torch.Tensor
    num_kv_heads: int
    num_blocks: int

    @property
    def num_rows(self) -> int:
        return self.own_table.shape[0]

    @property
    def num_prefixes(self) -> int:
        return self.prefix_table.shape[0]

    @cached_property
    def group_size(self) -> int:
        """Most rows of one prefix, G."""
        return int(torch.bincount(self.prefix_index, minlength=self.num_prefixes).max()) if self.num_rows else 0

    @cached_property
    def slots(self) -> torch.Tensor:
        """i64[R]: row r's place among the num_prefixes * G slots."""
        index = self.prefix_index
        order = torch.sort(index, stable=True).indices
        counts = torch.bincount(index, minlength=self.num_prefixes)
        rank = torch.arange(self.num_rows, device=order.device) - (counts.cumsum(0) - counts).index_select(0, index[order])
        return torch.empty_like(order).index_copy_(0, order, index[order] * self.group_size + rank)

    @cached_property
    def prefix(self) -> KeySet:
        return _key_set(self.prefix_table, self.prefix_lens, self.num_kv_heads, self.num_blocks)

    @cached_property
    def own(self) -> KeySet:
        return _key_set(self.own_table, self.own_lens, self.num_kv_heads, self.num_blocks)


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
    return Pages(prefix_table, prefix_lens, prefix_index, own_table, own_lens, num_kv_heads, num_blocks)


def _key_set(table: torch.Tensor, lens: torch.Tensor, num_kv_heads: int, num_blocks: int) -> KeySet:
    heads = torch.arange(num_kv_heads, device=table.device)[None, :, None] * num_blocks
    place = torch.arange(table.shape[1] * BLOCK_SIZE, device=table.device)
    return KeySet((heads + table[:, None, :]).flatten(), (place[None] < lens[:, None])[:, None, None])
