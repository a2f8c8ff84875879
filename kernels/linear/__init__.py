"""`linear`: every dense projection of the model (q, k, v, o, router, MLP, expert, head) goes through this one door.

    y[m, n] = sum_k x[m, k] * weight[n, k]        x [M, K], weight [N, K] -> y [M, N]

The order of the sum over K depends on (N, K) alone, never on M: a token's row has the same bits alone, in a decode batch
and in a training pack. That is what makes the sampler's logprobs equal the trainer's. Held for f32 and bf16 with N > 1;
f64, which only tests use, goes without.

Saved for backward: x and weight. Flops: 2MNK forward, 4MNK backward. Bytes: (MK + NK + MN) * itemsize.
Siblings: reference.py here, tests/kernels/test_linear.py.
"""

from __future__ import annotations

import torch

from kernels.checks import FLOATS, check
from kernels.dispatch import Implementation, Op
from kernels.linear.reference import linear_reference, make_inputs

__all__ = ["linear", "make_inputs"]

OP = Op("linear", (Implementation("reference", linear_reference),))


def linear(x: torch.Tensor, weight: torch.Tensor, impl: str = "auto") -> torch.Tensor:
    """x: float[M, K], weight: float[N, K] of the same dtype -> float[M, N]."""
    check("linear", "x", x, ("M", "K"), FLOATS)
    check("linear", "weight", weight, ("N", x.shape[1]), x.dtype, like=x)
    result: torch.Tensor = OP.choose(x.device, impl).run(x, weight)
    return result
