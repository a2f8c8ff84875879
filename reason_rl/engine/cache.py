"""The paged KV cache, and the engine's two `attn_fn`s: prefill (packed, then stored) and decode (paged)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.attention import BLOCK_SIZE, Pages, SegmentPlan, attention, paged_attention
from reason_rl.config import ModelConfig
from reason_rl.engine.native_decode import store_keys


def bytes_per_block(config: ModelConfig, dtype: torch.dtype) -> int:
    """Keys and values of BLOCK_SIZE tokens in all layers."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * BLOCK_SIZE * config.head_dim * dtype.itemsize


class KVCache:
    """keys and values: [L, K, num_blocks, BLOCK_SIZE, C] each; slot = block * BLOCK_SIZE + offset.

    With `is_native` each block has the memory layout of the native `decode`, and nothing else can read it.
    """

    def __init__(
        self, config: ModelConfig, num_blocks: int, dtype: torch.dtype, device: torch.device, is_native: bool = False
    ) -> None:
        shape = (config.num_hidden_layers, config.num_key_value_heads, num_blocks, BLOCK_SIZE, config.head_dim)
        self.is_native = is_native
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    def store(self, layer: int, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
        """Writes k and v [T, K, C] to slots i64[T] of every kv head."""
        if self.is_native:
            store_keys(self.keys[layer], self.values[layer], k, v, slots)
            return
        for cache, new in ((self.keys[layer], k), (self.values[layer], v)):
            by_slot = cache.view(cache.shape[0], -1, cache.shape[3])  # [K, num_blocks * BLOCK_SIZE, C]
            by_slot.index_copy_(1, slots, new.transpose(0, 1))


@dataclass(frozen=True)
class PrefillAttention:
    """`attn_fn` of a prefill pass: stores keys and values, and attends over the pack itself."""

    cache: KVCache
    plan: SegmentPlan
    slots: torch.Tensor
    """i64[T]"""

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        self.cache.store(layer, k, v, self.slots)
        return attention(q, k, v, self.plan)


@dataclass(frozen=True)
class DecodeAttention:
    """`attn_fn` of a decode step: stores each sequence's newest key and value, attends over its blocks."""

    cache: KVCache
    slots: torch.Tensor
    """i64[R], one for each running sequence."""
    pages: Pages

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        self.cache.store(layer, k, v, self.slots)
        return paged_attention(q, self.cache.keys[layer], self.cache.values[layer], self.pages)
