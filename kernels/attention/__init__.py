"""Attention, causal and grouped-query, in its two forms: over a pack of segments, and over a paged cache.

    out[t, h] = sum_j softmax_j(q[t, h] . k[j, h'] * scale) * v[j, h']      h' = h // (H / K)

`attention`: training and prefill. A segment sees all of its prefix (a group's prompt, standing once in the pack for its G
completions), then causally itself.
`paged_attention`: decoding, one query a sequence. The rows of a group name one prefix, whose blocks are read once for all of them;
each row's own keys follow on blocks of its own.

Scores, softmax and sums are f32 (f64 for f64 inputs); the result is rounded once to q's dtype. Keys are summed in tiles of fixed
size, prefix first, so that both forms give a token the same bits. Saved for backward: q, k, v and the weights.
Flops: 4 * H * C per query-key pair. Siblings: plan.py and reference.py here, tests/kernels/test_attention.py.
"""

from __future__ import annotations

import torch

from kernels.attention.plan import BLOCK_SIZE, SegmentPlan, ceil_to, plan_segments
from kernels.attention.reference import attention_reference, make_inputs, paged_attention_reference
from kernels.checks import FLOATS, check
from kernels.dispatch import Implementation, Op

__all__ = ["BLOCK_SIZE", "SegmentPlan", "attention", "ceil_to", "make_inputs", "paged_attention", "plan_segments"]

OP = Op("attention", (Implementation("reference", attention_reference),))
PAGED_OP = Op("paged_attention", (Implementation("reference", paged_attention_reference),))


def _check_heads(op: str, num_heads: int, num_kv_heads: int) -> None:
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"{op}: the heads of q must be a multiple of the heads of k, got {num_heads} and {num_kv_heads}")


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: torch.Tensor | SegmentPlan,
    scale: float | None = None, impl: str = "auto",
) -> torch.Tensor:
    """q: float[T, H, C], k and v: float[T, K, C], segments: i32[S, 4] on the CPU or their plan -> float[T, H, C]."""
    check("attention", "q", q, ("T", "H", "C"), FLOATS)
    check("attention", "k", k, (q.shape[0], "K", q.shape[2]), q.dtype, like=q)
    check("attention", "v", v, tuple(k.shape), q.dtype, like=q)
    _check_heads("attention", q.shape[1], k.shape[1])
    plan = segments if isinstance(segments, SegmentPlan) else plan_segments(segments, q.shape[0], q.device)
    if plan.num_tokens != q.shape[0]:
        raise ValueError(f"attention: the plan is for {plan.num_tokens} tokens, q holds {q.shape[0]}")
    result: torch.Tensor = OP.choose(q.device, impl).run(q, k, v, plan, q.shape[2] ** -0.5 if scale is None else scale)
    return result


def paged_attention(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, *, prefix_table: torch.Tensor, prefix_lens: torch.Tensor,
    prefix_index: torch.Tensor, own_table: torch.Tensor, own_lens: torch.Tensor, scale: float | None = None, impl: str = "auto",
) -> torch.Tensor:
    """q: float[R, H, C]; caches: float[K, num_blocks, BLOCK_SIZE, C], finite wherever a table points -> float[R, H, C].

    Prefix b has prefix_lens[b] keys in the blocks prefix_table[b] (i64[B, NP]); row r reads prefix prefix_index[r] (i64[R]),
    then own_lens[r] >= 1 keys in the blocks own_table[r] (i64[R, NO]). Tables are padded with any block.
    """
    op, num_rows = "paged_attention", q.shape[0]
    check(op, "q", q, ("R", "H", "C"), FLOATS)
    check(op, "k_cache", k_cache, ("K", "num_blocks", BLOCK_SIZE, q.shape[2]), q.dtype, like=q)
    check(op, "v_cache", v_cache, tuple(k_cache.shape), q.dtype, like=q)
    check(op, "prefix_table", prefix_table, ("B", "NP"), torch.int64, like=q)
    check(op, "prefix_lens", prefix_lens, (prefix_table.shape[0],), torch.int64, like=q)
    check(op, "prefix_index", prefix_index, (num_rows,), torch.int64, like=q)
    check(op, "own_table", own_table, (num_rows, "NO"), torch.int64, like=q)
    check(op, "own_lens", own_lens, (num_rows,), torch.int64, like=q)
    _check_heads(op, q.shape[1], k_cache.shape[0])
    result: torch.Tensor = PAGED_OP.choose(q.device, impl).run(
        q, k_cache, v_cache, prefix_table, prefix_lens, prefix_index, own_table, own_lens,
        q.shape[2] ** -0.5 if scale is None else scale)
    return result
