"""`swiglu` by csrc/swiglu: torch.ops.reason_rl.swiglu_{fwd,bwd}."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from kernels.native import OPS


class NativeSwiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor) -> torch.Tensor:
        gate_up = gate_up.contiguous()
        ctx.save_for_backward(gate_up)
        y = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
        OPS.swiglu_fwd(y, gate_up)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        (gate_up,) = ctx.saved_tensors
        dgate_up = torch.empty_like(gate_up)
        OPS.swiglu_bwd(dgate_up, grads[0].contiguous(), gate_up)
        return dgate_up


def swiglu_native(gate_up: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = NativeSwiglu.apply(gate_up)
    return result
