"""`rope` by csrc/rope, as torch.ops.reason_rl.rope_{fwd,bwd}; heads are read where they lie. The tables are facts: no gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from kernels.native import OPS
from kernels.rms_norm.native import as_rows


class NativeRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        OPS.rope_fwd(y, as_rows(x), cos, sin)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dy = grads[0]
        dx = torch.empty(dy.shape, dtype=dy.dtype, device=dy.device)
        OPS.rope_bwd(dx, as_rows(dy), *ctx.saved_tensors)
        return dx, None, None


def rope_native(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = NativeRope.apply(x, cos.float().contiguous(), sin.float().contiguous())
    return result
