"""`rms_norm` as autograd.Functions over ops that write their result. The norm reads strided rows in place
(heads of a qkv matrix); a GPU computes the norm of a sum in the same pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

Norm = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
AddNorm = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], tuple[torch.Tensor, torch.Tensor]]


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """x as a view of 2 or 3 dimensions, the last contiguous, as the kernels read it; a copy only if no view
    fits."""
    if x.dim() not in (2, 3):
        x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def rms_norm_by(ops: Any) -> Norm:
    """The op by `ops`, which has rms_norm_fwd and rms_norm_bwd: torch.ops.reason_rl or
    torch.ops.reason_rl_triton."""

    class RmsNorm(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
            weight = weight.contiguous()
            ctx.save_for_backward(x, weight)
            ctx.eps = eps
            rows = as_rows(x)
            y = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
            ops.rms_norm_fwd(y, rows, weight, eps)
            return y.view(x.shape)

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            x, weight = ctx.saved_tensors
            rows = as_rows(x)
            dx, dweight = torch.empty(rows.shape, dtype=x.dtype, device=x.device), torch.empty_like(weight)
            ops.rms_norm_bwd(dx, dweight, as_rows(grads[0]), rows, weight, ctx.eps)
            return dx.view(x.shape), dweight, None

    def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        y: torch.Tensor = RmsNorm.apply(x, weight.float(), eps)
        return y

    return rms_norm


def add_rms_norm_by(ops: Any) -> AddNorm:
    """The op by `ops`, which has add_rms_norm_fwd and add_rms_norm_bwd: torch.ops.reason_rl_triton."""

    class AddRmsNorm(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
        ) -> tuple[torch.Tensor, torch.Tensor]:
            x, residual, weight = x.contiguous(), residual.contiguous(), weight.contiguous()
            y, total = torch.empty_like(x), torch.empty_like(x)
            ops.add_rms_norm_fwd(y, total, x, residual, weight, eps)
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(total, weight)
            ctx.eps = eps
            return y, total

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
            total, weight = ctx.saved_tensors
            dy, dtotal = (None if grad is None else grad.contiguous() for grad in grads)
            if dy is None:
                return dtotal, dtotal, None, None
            dx, dweight = torch.empty_like(total), torch.empty_like(weight)
            ops.add_rms_norm_bwd(dx, dweight, dy, dtotal, total, weight, ctx.eps)
            return dx, dx, dweight, None

    def add_rms_norm(
        x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        normed, total = AddRmsNorm.apply(x, residual, weight.float(), eps)
        return normed, total

    return add_rms_norm


def add_then(norm: Norm) -> AddNorm:
    """add_rms_norm as torch's sum, then `norm`."""

    def add_rms_norm(
        x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total = residual + x
        return norm(total, weight, eps), total

    return add_rms_norm
