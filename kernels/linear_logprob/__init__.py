"""`linear_logprob`: from the last hidden states to each target token's logprob, and the entropy of its distribution.

    z[n, v]    = sum_d hidden[n, d] * weight[v, d] / temperature
    logprob[n] = z[n, target_ids[n]] - logsumexp_v z[n, v]
    entropy[n] = logsumexp_v z[n, v] - sum_v softmax(z)[n, v] * z[n, v]                        (both in nats)

z is accumulated in f32 from the operands' dtype; both results are f32. Differentiable in hidden and weight. The weight is in
hidden's dtype, or an f32 master that is rounded to it where it is used; dhidden has hidden's dtype, dweight the weight's and is
summed in f32.

Saved for backward: hidden, weight, target_ids, and 12N bytes (largest logit, log of the sum, entropy): the native backward computes
the logits again, 1024 tokens of the vocabulary at a time, and rounds their gradient to hidden's dtype for its two products. By the
reference z and softmax(z), 8NV bytes. Flops: 2NDV forward, 6NDV backward (4NDV by the reference). impl="torch" is the reference
with torch's own GEMM as it is, fast and bound to the batch.
Siblings: reference.py and native.py here, csrc/linear_logprob/, tests/kernels/test_linear_logprob.py; `sample` shares its logits.
"""

from __future__ import annotations

import torch

from kernels.checks import FLOATS, check
from kernels.dispatch import Implementation, Op
from kernels.linear_logprob.native import linear_logprob_native
from kernels.linear_logprob.reference import linear_logprob_reference, linear_logprob_torch, make_inputs
from kernels.native import DTYPES, cpu_why_not

__all__ = ["linear_logprob", "make_inputs"]

OP = Op("linear_logprob", (
    Implementation("native", linear_logprob_native, cpu_why_not, DTYPES),
    Implementation("reference", linear_logprob_reference),
    Implementation("torch", linear_logprob_torch, is_automatic=False)))


def linear_logprob(
    hidden: torch.Tensor, weight: torch.Tensor, target_ids: torch.Tensor, temperature: float = 1.0, impl: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden: float[N, D], weight: float[V, D] of the same dtype or f32, target_ids: i64[N] in [0, V)
    -> (logprob f32[N], entropy f32[N])."""
    check("linear_logprob", "hidden", hidden, ("N", "D"), FLOATS)
    check("linear_logprob", "weight", weight, ("V", hidden.shape[1]), (hidden.dtype, torch.float32), like=hidden)
    check("linear_logprob", "target_ids", target_ids, (hidden.shape[0],), torch.int64, like=hidden)
    if not temperature > 0:
        raise ValueError(f"linear_logprob: temperature must be above 0, got {temperature}")
    result: tuple[torch.Tensor, torch.Tensor] = OP.choose(hidden, impl).run(hidden, weight, target_ids, temperature)
    return result
