"""`rms_norm`: y = x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich 2019, arXiv:1910.07467).

Reduced in f32 and rounded once, at the end; the weight stays f32. Used before attention, before the experts, at the end,
and on each head's q and k (qk-norm). One row, one reduction of fixed length: no row sees another.

Saved for backward: x and weight (the native backward finds each row's scale again).
Bytes: 2 * numel(x) * itemsize forward, 3 backward.
Siblings: reference.py and native.py here, csrc/rms_norm/, tests/kernels/test_rms_norm.py.
"""

from __future__ import annotations

import torch

from kernels.checks import FLOATS, check, describe
from kernels.dispatch import Implementation, Op
from kernels.native import DTYPES, cpu_why_not
from kernels.rms_norm.native import rms_norm_native
from kernels.rms_norm.reference import make_inputs, rms_norm_reference

__all__ = ["make_inputs", "rms_norm"]

OP = Op("rms_norm", (
    Implementation("native", rms_norm_native, cpu_why_not, DTYPES),
    Implementation("reference", rms_norm_reference)))


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6, impl: str = "auto") -> torch.Tensor:
    """x: float[..., D], weight: f32[D] (f64 with f64) -> x's shape and dtype."""
    if x.dim() < 1 or x.dtype not in FLOATS:
        raise ValueError(f"rms_norm: x must be float[..., D], got {describe(x)}")
    check("rms_norm", "weight", weight, (x.shape[-1],), (torch.float32, torch.float64), like=x)
    result: torch.Tensor = OP.choose(x, impl).run(x, weight, eps)
    return result
