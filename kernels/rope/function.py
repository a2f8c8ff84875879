"""`rope` as an autograd.Function over two ops that write their result. Strided heads are read in place; cos
and sin have no gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from kernels.rms_norm.function import as_rows


def rope_by(ops: Any) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """The op by `ops`, which has rope_fwd and rope_bwd: torch.ops.reason_rl or torch.ops.reason_rl_triton."""

    class Rope(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(cos, sin)
            y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
            ops.rope_fwd(y, as_rows(x), cos, sin)
            return y

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            dy = grads[0]
            dx = torch.empty(dy.shape, dtype=dy.dtype, device=dy.device)
            ops.rope_bwd(dx, as_rows(dy), *ctx.saved_tensors)
            return dx, None, None

    def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = Rope.apply(x, cos.float().contiguous(), sin.float().contiguous())
        return y

    return rope
