"""Attention as an autograd.Function over ops that write their result, and the call of each implementation.

`attention_by(ops)`: ops has attention_fwd(out, stats, q, k, v, *tables, scale) and attention_bwd(dq, dk, dv,
dout, out, stats, q, k, v, *tables, scale). The tables describe the pack: for torch.ops.reason_rl the
segments, which C++ cuts into tiles; for torch.ops.reason_rl_triton the tables of tiles.py, on the device.
`stats` f32[K, T, H / K, 2] is saved for backward; each implementation defines its content.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from kernels import triton_ops
from kernels.attention.pages import Pages
from kernels.attention.plan import SegmentPlan
from kernels.native import OPS


def attention_by(ops: Any) -> Callable[..., torch.Tensor]:
    """-> attention(q, k, v, scale, *tables)"""

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, *tables: torch.Tensor
        ) -> torch.Tensor:
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
            (num_tokens, num_heads, _), num_kv_heads = q.shape, k.shape[1]
            out = torch.empty_like(q)
            stats = q.new_empty(num_kv_heads, num_tokens, num_heads // num_kv_heads, 2, dtype=torch.float32)
            ops.attention_fwd(out, stats, q, k, v, *tables, scale)
            ctx.save_for_backward(q, k, v, out, stats, *tables)
            ctx.scale = scale
            return out

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            q, k, v, out, stats, *tables = ctx.saved_tensors
            dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
            ops.attention_bwd(dq, dk, dv, grads[0].contiguous(), out, stats, q, k, v, *tables, ctx.scale)
            return dq, dk, dv, None, *(None for _ in tables)

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, *tables: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = Attention.apply(q, k, v, scale, *tables)
        return result

    return attention


_native, _triton = attention_by(OPS), attention_by(triton_ops.OPS)


def attention_native(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: SegmentPlan, scale: float) -> torch.Tensor:
    return _native(q, k, v, scale, plan.segments)


def attention_triton(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: SegmentPlan, scale: float) -> torch.Tensor:
    num_kv_heads = k.shape[1]
    return _triton(q, k, v, scale, *plan.tables(q.shape[1] // num_kv_heads, num_kv_heads, q.shape[2], q.dtype, q.device))


def paged_attention_native(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, pages: Pages, scale: float
) -> torch.Tensor:
    q = q.contiguous()
    out = torch.empty_like(q)
    tables = (pages.prefix_table, pages.prefix_lens, pages.prefix_index, pages.own_table, pages.own_lens)
    OPS.paged_attention(out, q, k_cache.contiguous(), v_cache.contiguous(), *(x.contiguous() for x in tables), scale)
    return out


def paged_attention_triton(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, pages: Pages, scale: float
) -> torch.Tensor:
    q = q.contiguous()
    out = torch.empty_like(q)
    tables = (pages.prefix_table, pages.prefix_lens, pages.prefix_index, pages.own_table, pages.own_lens, pages.order, pages.starts)
    triton_ops.OPS.paged_attention(
        out, q, k_cache.contiguous(), v_cache.contiguous(), *(x.contiguous() for x in tables), scale)
    return out


@functools.cache
def _missing_flash() -> str:
    return "" if importlib.util.find_spec("flash_attn") else "flash-attn is not installed"


def flash_unsupported_reason(device: torch.device) -> str:
    return _missing_flash() if device.type == "cuda" else "CUDA only"


def attention_flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: SegmentPlan, scale: float) -> torch.Tensor:
    """flash-attn's kernel, for comparisons. It supports no shared prefix, and is not batch-invariant."""
    if not plan.num_tokens:
        return q.clone()
    longest, shared = plan.segments[:, 1::2].amax(0).tolist()
    if shared:
        raise ValueError(f"attention: impl='flash_attn' takes segments without a shared prefix, got one of {shared} tokens")
    from flash_attn import flash_attn_varlen_func

    ends = plan.cu_seqlens(q.device)
    result: torch.Tensor = flash_attn_varlen_func(q, k, v, ends, ends, longest, longest, softmax_scale=scale, causal=True)
    return result
