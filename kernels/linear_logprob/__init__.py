"""`linear_logprob`: from the last hidden states to each target token's logprob, and the entropy of its distribution.

    z[n, v]    = sum_d hidden[n, d] * weight[v, d] / temperature
    logprob[n] = z[n, target_ids[n]] - logsumexp_v z[n, v]
    entropy[n] = logsumexp_v z[n, v] - sum_v softmax(z)[n, v] * z[n, v]                        (both in nats)

z is accumulated in f32 from the operands' dtype; both results are f32. Differentiable in hidden and weight. The weight is in
hidden's dtype, or an f32 master that is rounded to it where it is used; dhidden has hidden's dtype, dweight the weight's and is
summed in f32.

Saved for backward: hidden, weight, target_ids, and 12N bytes (largest logit, log of the sum, entropy): the backward computes the
logits again, a chunk of the vocabulary at a time, and rounds their gradient to hidden's dtype for its two products. By Triton in
bf16 also softmax(z), 2NV bytes, where it fits SOFTMAX_BYTES (function.py); by the reference z and softmax(z), 8NV bytes.
Flops: 2NDV forward, 6NDV backward, 4NDV with the softmax at hand. By Triton a row whose target is no token gets a logprob of NaN,
since a device cannot raise; natively that is an error. impl="torch" is the reference with torch's own GEMM as it is, fast and bound
to the batch.
Siblings: reference.py, function.py and triton_kernel.py here, csrc/linear_logprob/, tests/kernels/test_linear_logprob.py; `sample`
shares its logits.
"""

from __future__ import annotations

import torch

from kernels import triton_ops
from kernels.checks import FLOATS, check
from kernels.dispatch import Implementation, Op
from kernels.linear_logprob.function import kept_softmax, linear_logprob_by
from kernels.linear_logprob.reference import linear_logprob_reference, linear_logprob_torch, make_inputs
from kernels.native import DTYPES, OPS, cpu_unsupported_reason

__all__ = ["OP", "linear_logprob", "make_inputs"]

triton_ops.register("linear_logprob", {
    "linear_logprob_fwd": "(Tensor(a!) logprob, Tensor(b!) entropy, Tensor(c!) stats, Tensor(d!) softmax, Tensor(e!) tops, "
                          "Tensor hidden, Tensor weight, Tensor target_ids, float temperature) -> ()",
    "linear_logprob_bwd": "(Tensor(a!) dhidden, Tensor(b!) dweight, Tensor dlogprob, Tensor dentropy, Tensor hidden, "
                          "Tensor weight, Tensor target_ids, Tensor stats, Tensor entropy, Tensor softmax, Tensor tops, "
                          "float temperature) -> ()"})
OP = Op("linear_logprob", (
    Implementation("native", linear_logprob_by(OPS), cpu_unsupported_reason, DTYPES),
    Implementation("triton", linear_logprob_by(triton_ops.OPS, kept_softmax), triton_ops.unsupported_reason, triton_ops.DTYPES),
    Implementation("reference", linear_logprob_reference),
    Implementation("torch", linear_logprob_torch, is_automatic=False)))


def linear_logprob(
    hidden: torch.Tensor, weight: torch.Tensor, target_ids: torch.Tensor, temperature: float = 1.0, impl: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden: float[N, D], weight: float[V, D] of the same dtype or f32, target_ids: i64[N] in [0, V)
    -> (logprob f32[N], entropy f32[N])."""
    check_inputs(hidden, weight, target_ids, temperature)
    result: tuple[torch.Tensor, torch.Tensor] = OP.choose(hidden, impl).run(hidden, weight, target_ids, temperature)
    return result


def check_inputs(hidden: torch.Tensor, weight: torch.Tensor, target_ids: torch.Tensor, temperature: float) -> None:
    """What `linear_logprob` raises, for `linear_grpo_loss` too."""
    check("linear_logprob", "hidden", hidden, ("N", "D"), FLOATS)
    check("linear_logprob", "weight", weight, ("V", hidden.shape[1]), (hidden.dtype, torch.float32), like=hidden)
    check("linear_logprob", "target_ids", target_ids, (hidden.shape[0],), torch.int64, like=hidden)
    if not temperature > 0:
        raise ValueError(f"linear_logprob: temperature must be above 0, got {temperature}")
