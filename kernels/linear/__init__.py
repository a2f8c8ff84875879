"""`linear`: the matrix product of the model's dense projections (qkv, o, router, MLP).

    y[m, n] = sum_k x[m, k] * weight[n, k]        x [M, K], weight [N, K] -> y [M, N]

The order of the sum over K depends on (N, K) alone, never on M: a token's row has the same bits alone, in a
decode batch and in a training pack. This batch invariance makes the sampler's logprobs equal the trainer's.
It holds for f32 and bf16 in the native and the Triton kernel, and in the reference on the CPU for N > 1; not
for f64, which only tests use.

The weight has x's dtype, or is an f32 master that is rounded to x's dtype at each use. Sums are f32, y is
rounded once; dweight is summed in f32 and has the weight's dtype. impl="torch" is torch's own GEMM: fast, and
not batch-invariant.

Saved for backward: x and weight. Flops: 2MNK forward, 4MNK backward. Bytes moved forward, at least: (MK + NK
+ MN) * itemsize.
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
