"""`linear`: every dense projection of the model (q, k, v, o, router, MLP, expert, head) goes through this one door.

    y[m, n] = sum_k x[m, k] * weight[n, k]        x [M, K], weight [N, K] -> y [M, N]

The order of the sum over K depends on (N, K) alone, never on M: a token's row has the same bits alone, in a decode batch
and in a training pack. That is what makes the sampler's logprobs equal the trainer's. Held for f32 and bf16 by the native and the
Triton kernel, and by the reference on the CPU with N > 1; f64, which only tests use, goes without.

The weight is in x's dtype, or an f32 master that is rounded to x's dtype where it is used. Sums are f32, y is rounded once; dweight
is summed in f32 and has the weight's dtype. impl="torch" is torch's own GEMM as it is, fast and bound to the batch.

Saved for backward: x and weight. Flops: 2MNK forward, 4MNK backward. Bytes: (MK + NK + MN) * itemsize.
Siblings: reference.py, function.py and triton_kernel.py here, csrc/linear/, tests/kernels/test_linear.py.
"""

from __future__ import annotations

import torch

from kernels import triton_ops
from kernels.checks import FLOATS, check
from kernels.dispatch import Implementation, Op
from kernels.linear.function import linear_by
from kernels.linear.reference import linear_reference, linear_torch, make_inputs
from kernels.native import DTYPES, OPS, cpu_unsupported_reason

__all__ = ["OP", "linear", "make_inputs"]

triton_ops.register("linear", {
    "linear_fwd": "(Tensor(a!) y, Tensor x, Tensor weight) -> ()",
    "linear_dgrad": "(Tensor(a!) dx, Tensor dy, Tensor weight) -> ()",
    "linear_wgrad": "(Tensor(a!) dweight, Tensor dy, Tensor x) -> ()"})
OP = Op("linear", (
    Implementation("native", linear_by(OPS), cpu_unsupported_reason, DTYPES),
    Implementation("triton", linear_by(triton_ops.OPS), triton_ops.unsupported_reason, triton_ops.DTYPES),
    Implementation("reference", linear_reference),
    Implementation("torch", linear_torch, is_automatic=False)))


def linear(x: torch.Tensor, weight: torch.Tensor, impl: str = "auto") -> torch.Tensor:
    """x: float[M, K], weight: float[N, K] of the same dtype or f32 -> float[M, N]."""
    check("linear", "x", x, ("M", "K"), FLOATS)
    check("linear", "weight", weight, ("N", x.shape[1]), (x.dtype, torch.float32), like=x)
    result: torch.Tensor = OP.choose(x, impl).run(x, weight)
    return result
