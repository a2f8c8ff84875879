"""`rope`: rotary position embedding (Su et al. 2021, arXiv:2104.09864) in the half-split layout of Hugging
Face checkpoints.

    y[c]       = x[c] * cos - x[c + C/2] * sin
    y[c + C/2] = x[c + C/2] * cos + x[c] * sin          c < C/2

The angles are tables, built per position by the model (reason_rl/model/rope.py), so that the kernel needs no
scaling rules. Computed in f32, stored in x's dtype. Saved for backward: cos, sin. Bytes moved: 2 * numel(x) *
itemsize.
Siblings: reference.py, function.py and triton_kernel.py here, csrc/rope/, tests/kernels/test_rope.py.
"""

from __future__ import annotations

import torch

from kernels import triton_ops
from kernels.checks import FLOATS, check
from kernels.dispatch import Implementation, Op
from kernels.native import DTYPES, OPS, cpu_unsupported_reason
from kernels.rope.function import rope_by
from kernels.rope.reference import make_inputs, rope_reference

__all__ = ["make_inputs", "rope"]

triton_ops.register("rope", {
    "rope_fwd": "(Tensor(a!) y, Tensor x, Tensor cos, Tensor sin) -> ()",
    "rope_bwd": "(Tensor(a!) dx, Tensor dy, Tensor cos, Tensor sin) -> ()"})
OP = Op("rope", (
    Implementation("native", rope_by(OPS), cpu_unsupported_reason, DTYPES),
    Implementation("triton", rope_by(triton_ops.OPS), triton_ops.unsupported_reason, triton_ops.DTYPES),
    Implementation("reference", rope_reference)))


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, impl: str = "auto") -> torch.Tensor:
    """x: float[T, H, C], cos and sin: f32[T, C/2] -> float[T, H, C]."""
    check("rope", "x", x, ("T", "H", "C"), FLOATS)
    if x.shape[2] % 2:
        raise ValueError(f"rope: the head dim of x must be even, got {x.shape[2]}")
    for name, table in (("cos", cos), ("sin", sin)):
        check("rope", name, table, (x.shape[0], x.shape[2] // 2), (torch.float32, torch.float64), like=x)
    result: torch.Tensor = OP.choose(x, impl).run(x, cos, sin)
    return result
