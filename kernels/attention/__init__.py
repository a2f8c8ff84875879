"""Causal grouped-query attention, over a pack of segments and over a paged KV cache.

    out[t, h] = sum_j softmax_j(q[t, h] . k[j, h'] * scale) * v[j, h']      h' = h // (H / K)

`attention`: training and prefill. A segment attends to all of its prefix (a group's prompt, which the pack
holds once for its G completions), then causally to itself.
`paged_attention`: decode, one query per sequence. The rows of a group share a prefix, whose blocks are read
once for all of them; each row's own keys follow, on other blocks.

Scores, softmax and sums are f32 (f64 for f64 inputs); the result is rounded once to q's dtype. Keys are
summed in tiles of fixed size, prefix first, so that both ops give a token the same bits. On a GPU weights and
their gradients are rounded to bf16 before a matrix product if q is bf16, as in FlashAttention-2
(arXiv:2307.08691), whose online softmax this is. The kernels take even head dims up to 256; "auto" sends
others to the reference. `paged_attention` has no gradient. impl="flash_attn" calls that library, for segments
without a prefix; its bits depend on the batch.

Saved for backward: q, k, v, the result and two f32 per row (highest score, denominator), from which the
weights are recomputed; the reference saves the weights. dk and dv of a shared prefix are summed over its
readers in order, in f32.
Flops per query-key pair and head: 4 * C, and 10 * C backward (14 * C on a GPU, triton_backward.py).
Siblings: plan.py, pages.py, tiles.py, reference.py, function.py and triton_{kernel,forward,backward}.py here,
csrc/attention/, tests/kernels/test_attention{,_tiles,_native}.py, test_paged_attention.py.
"""

from __future__ import annotations

import torch

from kernels import triton_ops
from kernels.attention.function import (
    attention_flash,
    attention_native,
    attention_triton,
    flash_unsupported_reason,
    paged_attention_native,
    paged_attention_triton,
)
from kernels.attention.pages import Pages, plan_pages
from kernels.attention.plan import BLOCK_SIZE, SegmentPlan, plan_segments
from kernels.attention.reference import attention_reference, make_inputs, paged_attention_reference
from kernels.checks import FLOATS, check
from kernels.dispatch import Implementation, Op
from kernels.native import DTYPES, cpu_unsupported_reason

__all__ = ["BLOCK_SIZE", "Pages", "SegmentPlan", "attention", "make_inputs", "paged_attention", "plan_pages", "plan_segments"]

TABLES = "Tensor tiles, Tensor parts, Tensor wholes, Tensor readers, Tensor merges"
triton_ops.register("attention", {
    "attention_fwd": f"(Tensor(a!) out, Tensor(b!) stats, Tensor q, Tensor k, Tensor v, {TABLES}, float scale) -> ()",
    "attention_bwd": "(Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, Tensor dout, Tensor out, Tensor stats, Tensor q, Tensor k, "
                     f"Tensor v, {TABLES}, float scale) -> ()",
    "paged_attention": "(Tensor(a!) out, Tensor q, Tensor k_cache, Tensor v_cache, Tensor prefix_table, Tensor prefix_lens, "
                       "Tensor prefix_index, Tensor own_table, Tensor own_lens, Tensor order, Tensor starts, float scale) -> ()"})
OP = Op("attention", (
    Implementation("native", attention_native, cpu_unsupported_reason, DTYPES),
    Implementation("triton", attention_triton, triton_ops.unsupported_reason, triton_ops.DTYPES),
    Implementation("reference", attention_reference),
    Implementation("flash_attn", attention_flash, flash_unsupported_reason, (torch.bfloat16, torch.float16), is_automatic=False)))
PAGED_OP = Op("paged_attention", (
    Implementation("native", paged_attention_native, cpu_unsupported_reason, DTYPES),
    Implementation("triton", paged_attention_triton, triton_ops.unsupported_reason, triton_ops.DTYPES),
    Implementation("reference", paged_attention_reference)))


MAX_HEAD_DIM = 256


def _choose(op: Op, q: torch.Tensor, impl: str) -> Implementation:
    """The named implementation; under "auto" the reference if the kernels do not support q's head dim."""
    is_odd = q.shape[2] % 2 == 1 or not 2 <= q.shape[2] <= MAX_HEAD_DIM
    return op.choose(q, "reference" if is_odd and impl == "auto" else impl)


def _check_heads(op: str, num_heads: int, num_kv_heads: int) -> None:
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"{op}: the heads of q must be a multiple of the heads of k, got {num_heads} and {num_kv_heads}")


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: torch.Tensor | SegmentPlan,
    scale: float | None = None, impl: str = "auto",
) -> torch.Tensor:
    """q: float[T, H, C], k and v: float[T, K, C], segments: i32[S, 4] on the CPU, or their plan -> float[T,
    H, C]."""
    check("attention", "q", q, ("T", "H", "C"), FLOATS)
    check("attention", "k", k, (q.shape[0], "K", q.shape[2]), q.dtype, like=q)
    check("attention", "v", v, tuple(k.shape), q.dtype, like=q)
    _check_heads("attention", q.shape[1], k.shape[1])
    plan = segments if isinstance(segments, SegmentPlan) else plan_segments(segments, q.shape[0], q.device)
    if plan.num_tokens != q.shape[0]:
        raise ValueError(f"attention: the plan is for {plan.num_tokens} tokens, q holds {q.shape[0]}")
    result: torch.Tensor = _choose(OP, q, impl).run(q, k, v, plan, q.shape[2] ** -0.5 if scale is None else scale)
    return result


def paged_attention(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, pages: Pages, scale: float | None = None, impl: str = "auto"
) -> torch.Tensor:
    """q: float[R, H, C], caches: float[K, num_blocks, BLOCK_SIZE, C], finite in all blocks of `pages` ->
    float[R, H, C]. There is no gradient: an input that requires one is an error."""
    op = "paged_attention"
    check(op, "q", q, (pages.num_rows, "H", "C"), FLOATS)
    check(op, "k_cache", k_cache, (pages.num_kv_heads, pages.num_blocks, BLOCK_SIZE, q.shape[2]), q.dtype, like=q)
    check(op, "v_cache", v_cache, tuple(k_cache.shape), q.dtype, like=q)
    _check_heads(op, q.shape[1], k_cache.shape[0])
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k_cache, v_cache)):
        raise ValueError(f"{op} has no gradient, but q, k_cache or v_cache requires one: detach it, or call under torch.no_grad()")
    result: torch.Tensor = _choose(PAGED_OP, q, impl).run(
        q, k_cache, v_cache, pages, q.shape[2] ** -0.5 if scale is None else scale)
    return result
