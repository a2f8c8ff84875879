"""Attention by csrc/attention: torch.ops.reason_rl.attention_{fwd,bwd} over a pack, and paged_attention over a cache."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from kernels.attention.pages import Pages
from kernels.attention.plan import SegmentPlan
from kernels.native import OPS


class NativeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: torch.Tensor, scale: float
    ) -> torch.Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        (num_tokens, num_heads, _), num_kv_heads = q.shape, k.shape[1]
        out = torch.empty_like(q)
        stats = q.new_empty(num_kv_heads, num_tokens, num_heads // num_kv_heads, 2, dtype=torch.float32)
        OPS.attention_fwd(out, stats, q, k, v, segments, scale)
        ctx.save_for_backward(q, k, v, segments, out, stats)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, segments, out, stats = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        OPS.attention_bwd(dq, dk, dv, grads[0].contiguous(), out, stats, q, k, v, segments, ctx.scale)
        return dq, dk, dv, None, None


def attention_native(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: SegmentPlan, scale: float) -> torch.Tensor:
    result: torch.Tensor = NativeAttention.apply(q, k, v, plan.segments, scale)
    return result


def paged_attention_native(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, pages: Pages, scale: float
) -> torch.Tensor:
    q = q.contiguous()
    out = torch.empty_like(q)
    tables = (pages.prefix_table, pages.prefix_lens, pages.prefix_index, pages.own_table, pages.own_lens)
    OPS.paged_attention(out, q, k_cache.contiguous(), v_cache.contiguous(), *(x.contiguous() for x in tables), scale)
    return out
