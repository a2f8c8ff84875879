"""`linear_logprob`: from the last hidden states to each target token's logprob and its distribution's
entropy.

    z[n, v]    = sum_d hidden[n, d] * weight[v, d] / temperature
    logprob[n] = z[n, target_ids[n]] - logsumexp_v z[n, v]
    entropy[n] = logsumexp_v z[n, v] - sum_v softmax(z)[n, v] * z[n, v]                        (both in nats)

z is accumulated in f32 from operands of hidden's dtype; both results are f32. Differentiable in hidden and
weight. The weight has hidden's dtype, or is an f32 master that is rounded to it at each use. dhidden has
hidden's dtype; dweight has the weight's, and is summed in f32.

Saved for backward: hidden, weight, target_ids, and 12N bytes (largest logit, log of the sum, entropy). The
backward pass recomputes the logits, one chunk of the vocabulary at a time, and rounds their gradient to
hidden's dtype for its two products. Triton in bf16 also saves softmax(z), 2NV bytes, if it fits SOFTMAX_BYTES
(function.py); the reference saves z and softmax(z), 8NV bytes.
Flops: 2NDV forward, 6NDV backward, 4NDV with a saved softmax. A target outside the vocabulary is an error
natively; by Triton its logprob is NaN, since a device cannot raise. impl="torch" is the reference with
torch's own GEMM: fast, and not batch-invariant.
Siblings: reference.py, function.py and triton_kernel.py here, csrc/linear_logprob/,
tests/kernels/test_linear_logprob.py; `sample` computes the same logits.
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
    """Raises linear_logprob's errors; linear_grpo_loss calls it too."""
    check("linear_logprob", "hidden", hidden, ("N", "D"), FLOATS)
    check("linear_logprob", "weight", weight, ("V", hidden.shape[1]), (hidden.dtype, torch.float32), like=hidden)
    check("linear_logprob", "target_ids", target_ids, (hidden.shape[0],), torch.int64, like=hidden)
    if not temperature > 0:
        raise ValueError(f"linear_logprob: temperature must be above 0, got {temperature}")
