"""`rms_norm` by csrc/rms_norm, as torch.ops.reason_rl.rms_norm_{fwd,bwd}; rows are read where they lie (heads of a qkv matrix)."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from kernels.native import OPS


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """x as csrc/common/strided.h reads it: 2 or 3 dimensions, the last in order; a copy only where that is not so."""
    if x.dim() not in (2, 3):
        x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


class NativeRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        weight = weight.contiguous()
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        rows = as_rows(x)
        y = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
        OPS.rms_norm_fwd(y, rows, weight, eps)
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = as_rows(x)
        dx, dweight = torch.empty(rows.shape, dtype=x.dtype, device=x.device), torch.empty_like(weight)
        OPS.rms_norm_bwd(dx, dweight, as_rows(grads[0]), rows, weight, ctx.eps)
        return dx.view(x.shape), dweight, None


def rms_norm_native(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    result: torch.Tensor = NativeRmsNorm.apply(x, weight.float(), eps)
    return result
