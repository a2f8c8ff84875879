"""`Pages`: the KV blocks of each row of a decode step, built once per step and used by every layer.

The rows of a group share a prefix. They get adjacent slots, so that a prefix's keys are read once for all of
them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from kernels.attention.plan import BLOCK_SIZE
from kernels.checks import check


@dataclass(frozen=True)
class KeySet:
    """The keys of all prefixes, or of all rows, in whole blocks."""

    block_index: torch.Tensor
    """i64[readers * K * NB]: rows of the cache viewed as [K * num_blocks, BLOCK_SIZE * C]."""
    mask: torch.Tensor
    """bool[readers, 1, 1, NB * BLOCK_SIZE]: True at keys, False at padding."""


@dataclass(frozen=True)
class Pages:
    """The block tables (see `plan_pages`); the other properties are derived at their first use."""

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
    def order(self) -> torch.Tensor:
        """i64[R]: the rows, sorted by prefix."""
        return torch.sort(self.prefix_index, stable=True).indices

    @cached_property
    def starts(self) -> torch.Tensor:
        """i64[B + 1]: the rows of prefix b are order[starts[b]:starts[b + 1]]. searchsorted avoids a device
        sync."""
        prefixes = torch.arange(self.num_prefixes + 1, device=self.prefix_index.device)
        return torch.searchsorted(self.prefix_index.index_select(0, self.order), prefixes)

    @cached_property
    def group_size(self) -> int:
        """G: the most rows of any prefix."""
        return int(self.starts.diff().max()) if self.num_rows else 0

    @cached_property
    def slots(self) -> torch.Tensor:
        """i64[R]: the slot of row r among the num_prefixes * G slots."""
        prefix = self.prefix_index.index_select(0, self.order)
        rank = torch.arange(self.num_rows, device=prefix.device) - self.starts.index_select(0, prefix)
        return torch.empty_like(prefix).index_copy_(0, self.order, prefix * self.group_size + rank)

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
    """Prefix b has prefix_lens[b] keys in the blocks prefix_table[b] (i64[B, NP]). Row r reads prefix
    prefix_index[r] (i64[R]), then own_lens[r] >= 1 keys in the blocks own_table[r] (i64[R, NO]). Any block of
    the cache may pad a table, such as the null block."""
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
