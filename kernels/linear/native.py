"""`linear` by csrc/linear: the product, and its two gradients, as torch.ops.reason_rl.linear_{fwd,dgrad,wgrad}."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from kernels.native import OPS


class NativeLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        ctx.save_for_backward(x, weight)
        y = x.new_empty(x.shape[0], weight.shape[0])
        OPS.linear_fwd(y, x, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        x, weight = ctx.saved_tensors
        dy = grads[0].contiguous()
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            dx = torch.empty_like(x)
            OPS.linear_dgrad(dx, dy, weight)
        if ctx.needs_input_grad[1]:
            dweight = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
            OPS.linear_wgrad(dweight, dy, x)
            dweight = dweight.to(weight.dtype)
        return dx, dweight


def linear_native(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = NativeLinear.apply(x, weight)
    return result
