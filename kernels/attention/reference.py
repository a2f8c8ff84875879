"""The specification of attention, packed and paged: both call `attend`, which fixes the order of every sum.

Products take fixed blocks of rows (kernels/products.py) and tiles of KEY_TILE keys: the keys of the prefix,
then the own keys, each padded to whole tiles. So every product has one shape for any pack or decode batch,
and its sums have one order. Masked keys add exact zeros. The row maximum is exact in any order. The
denominator is one more column of the product with the values, so it is summed in the same order.
tests/kernels/test_attention.py checks the bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from kernels.attention.pages import KeySet, Pages
from kernels.attention.plan import SegmentPlan
from kernels.products import batch_in_blocks

KEY_TILE = 64
MIN_COLUMNS = 16
"""Fewest columns of a product: torch takes other code paths for narrower ones."""
MASKED = -1e30
"""exp(MASKED - max) is exactly 0 if the row has a real score; a padding row, which is all masked, stays
finite."""


def _padding(num_keys: int) -> int:
    """Keys that fill the last tile."""
    return -num_keys % KEY_TILE


def weigh(scores: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Masked scores [..., J_i] of prefix and own keys -> exp(score - the row's maximum over both)."""
    top = torch.stack([part.detach().amax(-1) for part in scores]).amax(0)[..., None]
    return [torch.exp(part - top) for part in scores]


def sum_values(weights: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """weights [..., M, J'], v [..., J, C] -> [..., M, C + 1 or more]: the weighted sum of v; column C sums
    the weights. J' is J, padded to whole tiles with weights of 0."""
    head_dim, padding = v.shape[-1], _padding(v.shape[-2])
    values = F.pad(v, (0, max(1, MIN_COLUMNS - head_dim), 0, padding), value=1.0)
    total = None
    for w, x in zip(weights.split(KEY_TILE, -1), values.split(KEY_TILE, -2), strict=True):
        part = batch_in_blocks(w, x)
        total = part if total is None else total + part
    assert total is not None
    return total


def normalise(total: torch.Tensor, head_dim: int) -> torch.Tensor:
    return total[..., :head_dim] / total[..., head_dim : head_dim + 1]


def masked_scores(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """q [..., M, C], k [..., J, C], mask bool[..., J] -> [..., M, J'], with J' = J padded to whole tiles."""
    padding = _padding(k.shape[-2])
    tiles = F.pad(k, (0, 0, 0, padding)).transpose(-1, -2).split(KEY_TILE, -1)
    scores = torch.cat([batch_in_blocks(q, tile) for tile in tiles], -1)
    return torch.where(F.pad(mask, (0, padding)), scores * scale, MASKED)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def attention_reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: SegmentPlan, scale: float) -> torch.Tensor:
    """q [T, H, C], k and v [T, K, C] -> [T, H, C]; computed in f32, rounded once to q's dtype."""
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    repeat = num_heads // num_kv_heads
    q_rows, k_rows, v_rows = (F.pad(_wide(x).flatten(1), (0, 0, 0, 1)) for x in (q, k, v))  # row T is zero

    def take(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """[T + 1, K * C] -> [S', K, J, C]"""
        return rows.index_select(0, index.flatten()).view(*index.shape, num_kv_heads, head_dim).transpose(1, 2)

    outputs = []
    for chunk in plan.chunks:
        num_segments, num_queries = chunk.own_index.shape
        # [S', M, K, R, C] -> [S', K, M * R, C]: the R query heads of a kv head are adjacent rows
        qc = q_rows.index_select(0, chunk.own_index.flatten()).view(num_segments, num_queries, num_kv_heads, repeat, head_dim)
        qc = qc.permute(0, 2, 1, 3, 4).reshape(num_segments, num_kv_heads, num_queries * repeat, head_dim)
        parts = [(chunk.own_index, chunk.own_mask.repeat_interleave(repeat, dim=1)[:, None])]  # mask [S', 1, M * R, M]
        if chunk.prefix_index.shape[1]:
            parts.insert(0, (chunk.prefix_index, chunk.prefix_mask[:, None, None]))
        weights = weigh([masked_scores(qc, take(k_rows, index), mask, scale) for index, mask in parts])
        sums = [sum_values(w, take(v_rows, index)) for w, (index, _) in zip(weights, parts, strict=True)]
        out = normalise(sums[0] if len(sums) == 1 else sums[0] + sums[1], head_dim)
        out = out.view(num_segments, num_kv_heads, num_queries, repeat, head_dim).permute(0, 2, 1, 3, 4)
        outputs.append(out.reshape(num_segments * num_queries, num_heads * head_dim))
    if not outputs:
        return q.clone()
    packed = torch.cat(outputs).index_select(0, plan.output_index)
    return packed.view(num_tokens, num_heads, head_dim).to(q.dtype)


def _read(cache: torch.Tensor, keys: KeySet) -> torch.Tensor:
    """cache [K, num_blocks, BLOCK_SIZE, C] -> [readers, K, NB * BLOCK_SIZE, C]; whole blocks are copied at a
    time."""
    num_kv_heads, num_blocks, _, head_dim = cache.shape
    blocks = cache.view(num_kv_heads * num_blocks, -1).index_select(0, keys.block_index)
    return _wide(blocks).view(keys.mask.shape[0], num_kv_heads, keys.mask.shape[-1], head_dim)


def paged_attention_reference(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, pages: Pages, scale: float
) -> torch.Tensor:
    """q [R, H, C], caches [K, num_blocks, BLOCK_SIZE, C] -> [R, H, C]; rows that share a prefix read it
    together, once."""
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads, num_prefixes, group_size = k_cache.shape[0], pages.num_prefixes, pages.group_size
    if not num_rows:
        return q.clone()
    rows = _wide(q).view(num_rows, num_kv_heads, -1, head_dim)  # [R, K, H / K, C]
    repeat = rows.shape[2]

    def group(x: torch.Tensor) -> torch.Tensor:
        """[R, K, H / K, A] -> [B, K, G * H / K, A]"""
        slots = x.new_zeros(num_prefixes * group_size, *x.shape[1:]).index_copy_(0, pages.slots, x)
        slots = slots.view(num_prefixes, group_size, num_kv_heads, repeat, -1).transpose(1, 2)
        return slots.reshape(num_prefixes, num_kv_heads, group_size * repeat, -1)

    def ungroup(x: torch.Tensor) -> torch.Tensor:
        x = x.view(num_prefixes, num_kv_heads, group_size, repeat, -1).transpose(1, 2)
        return x.reshape(num_prefixes * group_size, num_kv_heads, repeat, -1).index_select(0, pages.slots)

    # Weights over the prefix and the own keys together.
    prefix_scores = ungroup(masked_scores(group(rows), _read(k_cache, pages.prefix), pages.prefix.mask, scale))
    own_scores = masked_scores(rows, _read(k_cache, pages.own), pages.own.mask, scale)
    prefix_weights, own_weights = weigh([prefix_scores, own_scores])
    # Their values.
    prefix_sum = ungroup(sum_values(group(prefix_weights), _read(v_cache, pages.prefix)))
    total = prefix_sum + sum_values(own_weights, _read(v_cache, pages.own))
    return normalise(total, head_dim).reshape(num_rows, num_heads, head_dim).to(q.dtype)


def make_inputs(
    segments: list[tuple[int, int, int, int]], num_heads: int, num_kv_heads: int, head_dim: int,
    dtype: torch.dtype, device: str = "cpu", seed: int = 0,
) -> dict[str, torch.Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    num_tokens = sum(segment[1] for segment in segments)
    q, k, v = (
        torch.randn(num_tokens, heads, head_dim, generator=generator, device=device).to(dtype)
        for heads in (num_heads, num_kv_heads, num_kv_heads)
    )
    return {"q": q, "k": k, "v": v, "segments": torch.tensor(segments, dtype=torch.int32).view(-1, 4)}

