"""`swiglu` as an autograd.Function over two ops that write their result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable


def swiglu_by(ops: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """The op by `ops`, which has swiglu_fwd and swiglu_bwd: torch.ops.reason_rl or
    torch.ops.reason_rl_triton."""

    class Swiglu(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, gate_up: torch.Tensor) -> torch.Tensor:
            gate_up = gate_up.contiguous()
            ctx.save_for_backward(gate_up)
            y = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
            ops.swiglu_fwd(y, gate_up)
            return y

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
            (gate_up,) = ctx.saved_tensors
            dgate_up = torch.empty_like(gate_up)
            ops.swiglu_bwd(dgate_up, grads[0].contiguous(), gate_up)
            return dgate_up

    def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = Swiglu.apply(gate_up)
        return y

    return swiglu
