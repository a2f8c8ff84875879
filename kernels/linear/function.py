"""`linear` as an autograd.Function over three ops that write their result: the product and its two
gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable


def linear_by(ops: Any) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The op by `ops`, which has linear_fwd, linear_dgrad and linear_wgrad: torch.ops.reason_rl or
    torch.ops.reason_rl_triton."""

    class Linear(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            x, weight = x.contiguous(), weight.contiguous()
            ctx.save_for_backward(x, weight)
            y = x.new_empty(x.shape[0], weight.shape[0])
            ops.linear_fwd(y, x, weight)
            return y

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
            x, weight = ctx.saved_tensors
            dy = grads[0].contiguous()
            dx = dweight = None
            if ctx.needs_input_grad[0]:
                dx = torch.empty_like(x)
                ops.linear_dgrad(dx, dy, weight)
            if ctx.needs_input_grad[1]:
                dweight = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
                ops.linear_wgrad(dweight, dy, x)
                dweight = dweight.to(weight.dtype)
            return dx, dweight

    def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = Linear.apply(x, weight)
        return y

    return linear
