"""`linear_logprob`: from the last hidden states to each target token's logprob, and the entropy of its distribution.

    z[n, v]    = sum_d hidden[n, d] * weight[v, d] / temperature
    logprob[n] = z[n, target_ids[n]] - logsumexp_v z[n, v]
    entropy[n] = logsumexp_v z[n, v] - sum_v softmax(z)[n, v] * z[n, v]                        (both in nats)

z is accumulated in f32 from the operands' dtype; both results are f32. Differentiable in hidden and weight.
Saved for backward by the reference: z and softmax(z), 8NV bytes. Flops: 2NDV forward, 4NDV backward.
Siblings: reference.py here, tests/kernels/test_linear_logprob.py; `sample` shares its logits.
"""

from __future__ import annotations

import torch

from kernels.checks import FLOATS, check
from kernels.dispatch import Implementation, Op
from kernels.linear_logprob.reference import linear_logprob_reference, make_inputs

__all__ = ["linear_logprob", "make_inputs"]

OP = Op("linear_logprob", (Implementation("reference", linear_logprob_reference),))


def linear_logprob(
    hidden: torch.Tensor, weight: torch.Tensor, target_ids: torch.Tensor, temperature: float = 1.0, impl: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden: float[N, D], weight: float[V, D], target_ids: i64[N] in [0, V) -> (logprob f32[N], entropy f32[N])."""
    check("linear_logprob", "hidden", hidden, ("N", "D"), FLOATS)
    check("linear_logprob", "weight", weight, ("V", hidden.shape[1]), hidden.dtype, like=hidden)
    check("linear_logprob", "target_ids", target_ids, (hidden.shape[0],), torch.int64, like=hidden)
    if not temperature > 0:
        raise ValueError(f"linear_logprob: temperature must be above 0, got {temperature}")
    result: tuple[torch.Tensor, torch.Tensor] = OP.choose(hidden, impl).run(hidden, weight, target_ids, temperature)
    return result
