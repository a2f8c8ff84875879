"""`swiglu`: y = silu(gate) * up, where gate and up are the halves of the last dimension (Shazeer 2020,
arXiv:2002.05202).

Computed in f32, stored in the input's dtype. Saved for backward: gate_up. Bytes moved: 3 * T * I * itemsize
forward, 5 backward, each in one pass on a GPU.
Siblings: reference.py, function.py and triton_kernel.py here, csrc/swiglu/, tests/kernels/test_swiglu.py.
"""

from __future__ import annotations

import torch

from kernels import triton_ops
from kernels.checks import FLOATS, check
from kernels.dispatch import Implementation, Op
from kernels.native import DTYPES, OPS, cpu_unsupported_reason
from kernels.swiglu.function import swiglu_by
from kernels.swiglu.reference import make_inputs, swiglu_reference

__all__ = ["make_inputs", "swiglu"]

triton_ops.register("swiglu", {
    "swiglu_fwd": "(Tensor(a!) y, Tensor gate_up) -> ()",
    "swiglu_bwd": "(Tensor(a!) dgate_up, Tensor dy, Tensor gate_up) -> ()"})
OP = Op("swiglu", (
    Implementation("native", swiglu_by(OPS), cpu_unsupported_reason, DTYPES),
    Implementation("triton", swiglu_by(triton_ops.OPS), triton_ops.unsupported_reason, triton_ops.DTYPES),
    Implementation("reference", swiglu_reference)))


def swiglu(gate_up: torch.Tensor, impl: str = "auto") -> torch.Tensor:
    """gate_up: float[T, 2I] -> float[T, I]."""
    check("swiglu", "gate_up", gate_up, ("T", "2I"), FLOATS)
    if gate_up.shape[1] % 2:
        raise ValueError(f"swiglu: gate_up must hold two halves of equal width, got width {gate_up.shape[1]}")
    result: torch.Tensor = OP.choose(gate_up, impl).run(gate_up)
    return result
