"""`rms_norm`: y = x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich 2019,
arXiv:1910.07467).

Reduced in f32 and rounded once, at the end; the weight stays f32. The model uses it before attention, before
the experts, before the head, and on each head's q and k (qk-norm). Each row is one reduction of fixed length,
independent of the other rows.

`add_rms_norm` returns the norm of total = x + residual, and total, rounded to x's dtype; on a GPU in one pass
instead of two.

Saved for backward: x (or total) and weight; the backward pass recomputes each row's scale.
Bytes moved: 2 * numel(x) * itemsize forward, 3 backward; for add_rms_norm 4 and 4 on a GPU.
Siblings: reference.py, function.py and triton_kernel.py here, csrc/rms_norm/, tests/kernels/test_rms_norm.py.
"""

from __future__ import annotations

import torch

from kernels import triton_ops
from kernels.checks import FLOATS, check, describe
from kernels.dispatch import Implementation, Op
from kernels.native import DTYPES, OPS, cpu_unsupported_reason
from kernels.rms_norm.function import add_rms_norm_by, add_then, rms_norm_by
from kernels.rms_norm.reference import make_inputs, rms_norm_reference

__all__ = ["add_rms_norm", "make_inputs", "rms_norm"]

triton_ops.register("rms_norm", {
    "rms_norm_fwd": "(Tensor(a!) y, Tensor x, Tensor weight, float eps) -> ()",
    "rms_norm_bwd": "(Tensor(a!) dx, Tensor(b!) dweight, Tensor dy, Tensor x, Tensor weight, float eps) -> ()",
    "add_rms_norm_fwd": "(Tensor(a!) y, Tensor(b!) total, Tensor x, Tensor residual, Tensor weight, float eps) -> ()",
    "add_rms_norm_bwd":
        "(Tensor(a!) dx, Tensor(b!) dweight, Tensor dy, Tensor? dtotal, Tensor total, Tensor weight, float eps) -> ()"})
OP = Op("rms_norm", (
    Implementation("native", rms_norm_by(OPS), cpu_unsupported_reason, DTYPES),
    Implementation("triton", rms_norm_by(triton_ops.OPS), triton_ops.unsupported_reason, triton_ops.DTYPES),
    Implementation("reference", rms_norm_reference)))
ADD_OP = Op("add_rms_norm", (
    Implementation("native", add_then(rms_norm_by(OPS)), cpu_unsupported_reason, DTYPES),
    Implementation("triton", add_rms_norm_by(triton_ops.OPS), triton_ops.unsupported_reason, triton_ops.DTYPES),
    Implementation("reference", add_then(rms_norm_reference))))


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6, impl: str = "auto") -> torch.Tensor:
    """x: float[..., D], weight: f32[D] or f64[D] -> float[..., D], x's dtype."""
    if x.dim() < 1 or x.dtype not in FLOATS:
        raise ValueError(f"rms_norm: x must be float[..., D], got {describe(x)}")
    check("rms_norm", "weight", weight, (x.shape[-1],), (torch.float32, torch.float64), like=x)
    result: torch.Tensor = OP.choose(x, impl).run(x, weight, eps)
    return result


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6, impl: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """x and residual: float[..., D] of one dtype, weight: f32[D] or f64[D] -> (norm of the sum, the sum),
    both like x."""
    if x.dim() < 1 or x.dtype not in FLOATS:
        raise ValueError(f"add_rms_norm: x must be float[..., D], got {describe(x)}")
    check("add_rms_norm", "residual", residual, tuple(x.shape), x.dtype, like=x)
    check("add_rms_norm", "weight", weight, (x.shape[-1],), (torch.float32, torch.float64), like=x)
    result: tuple[torch.Tensor, torch.Tensor] = ADD_OP.choose(x, impl).run(x, residual, weight, eps)
    return result
