"""The specification of attention, packed and paged: both call `attend`, which fixes the order of every sum.

What makes the two agree to the bit in float32 on the CPU (seen with torch 2.13; tests/kernels/test_attention.py watches it):
torch.bmm gives a row the same bits in any batch of 4 rows or more, and sums over the inner dimension one after the other
up to at least 128 terms. So queries are padded to 8 rows, keys are taken in tiles of 128 counted from the start of the
layout, and masked keys add exact zeros. The row maximum is exact in any order; the denominator is one more column of the
product with the values, so that it is summed in that same order.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels.attention.plan import BLOCK_SIZE, SegmentPlan, ceil_to

KEY_TILE = 128
MIN_QUERIES = 8
MASKED = -1e30
"""exp(MASKED - max) is exactly 0 beside any real score; a padding row, all masked, stays finite."""


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """q [B, K, M, C], k and v [B, K, J, C], mask bool[B, 1, M, J] -> [B, K, M, C]; all in one float dtype, f32 or f64."""
    scores = torch.matmul(q, k.transpose(-1, -2)) * scale  # [B, K, M, J]
    scores = torch.where(mask, scores, MASKED)
    weights = torch.exp(scores - scores.detach().amax(-1, keepdim=True))
    values = F.pad(v, (0, 1), value=1.0)  # [B, K, J, C + 1]: the last column sums the weights
    total = torch.matmul(weights[..., :KEY_TILE], values[..., :KEY_TILE, :])
    for first in range(KEY_TILE, k.shape[2], KEY_TILE):
        total = total + torch.matmul(weights[..., first : first + KEY_TILE], values[..., first : first + KEY_TILE, :])
    return total[..., :-1] / total[..., -1:]


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def attention_reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: SegmentPlan, scale: float) -> torch.Tensor:
    """q [T, H, C], k and v [T, K, C] -> [T, H, C]; computed in f32, rounded once to q's dtype."""
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    repeat = num_heads // num_kv_heads
    q_rows, k_rows, v_rows = (F.pad(_wide(x).flatten(1), (0, 0, 0, 1)) for x in (q, k, v))  # row T is zero
    outputs = []
    for chunk in plan.chunks:
        num_segments, num_queries = chunk.query_index.shape
        num_keys = chunk.key_index.shape[1]
        # [S', M, K, R, C] -> [S', K, M * R, C]: the R query heads of a kv head stand side by side as rows
        qc = q_rows.index_select(0, chunk.query_index.flatten()).view(num_segments, num_queries, num_kv_heads, repeat, head_dim)
        qc = qc.permute(0, 2, 1, 3, 4).reshape(num_segments, num_kv_heads, num_queries * repeat, head_dim)
        kc, vc = (
            x.index_select(0, chunk.key_index.flatten()).view(num_segments, num_keys, num_kv_heads, head_dim).transpose(1, 2)
            for x in (k_rows, v_rows)
        )
        mask = chunk.mask.repeat_interleave(repeat, dim=1)[:, None]  # [S', 1, M * R, J]
        out = attend(qc, kc, vc, mask, scale).view(num_segments, num_kv_heads, num_queries, repeat, head_dim)
        outputs.append(out.permute(0, 2, 1, 3, 4).reshape(num_segments * num_queries, num_heads * head_dim))
    if not outputs:
        return q.clone()
    packed = torch.cat(outputs).index_select(0, plan.output_index)
    return packed.view(num_tokens, num_heads, head_dim).to(q.dtype)


def paged_attention_reference(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_table: torch.Tensor,
    prefix_lens: torch.Tensor, own_lens: torch.Tensor, scale: float,
) -> torch.Tensor:
    """q [R, H, C], caches [K, num_blocks, BLOCK_SIZE, C], block_table i64[R, NB] -> [R, H, C]."""
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads, num_blocks = k_cache.shape[:2]
    repeat = num_heads // num_kv_heads
    heads = torch.arange(num_kv_heads, device=q.device)[None, :, None] * num_blocks
    index = (heads + block_table[:, None, :]).flatten()  # [R * K * NB]: whole blocks are copied at a time
    k, v = (
        _wide(cache.view(num_kv_heads * num_blocks, -1).index_select(0, index)).view(num_rows, num_kv_heads, -1, head_dim)
        for cache in (k_cache, v_cache)
    )
    place = torch.arange(k.shape[2], device=q.device)[None]
    own_place = place - (prefix_lens[:, None] + BLOCK_SIZE - 1) // BLOCK_SIZE * BLOCK_SIZE
    mask = (place < prefix_lens[:, None]) | ((own_place >= 0) & (own_place < own_lens[:, None]))
    # A block may hold what a freed sequence left; its weight is 0, but 0 * NaN would not be.
    v = torch.where(mask[:, None, :, None], v, 0.0)
    rows = F.pad(_wide(q).view(num_rows, num_kv_heads, repeat, head_dim), (0, 0, 0, max(0, MIN_QUERIES - repeat)))
    out = attend(rows, k, v, mask[:, None, None, :], scale)[:, :, :repeat]
    return out.reshape(num_rows, num_heads, head_dim).to(q.dtype)


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


__all__ = ["attend", "attention_reference", "ceil_to", "make_inputs", "paged_attention_reference"]
