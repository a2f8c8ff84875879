"""`linear_grpo_loss`: from the last hidden states to the policy loss, its metrics and its gradients in one go (steps 6 and 7).

    logprobs, entropy = linear_logprob(hidden, weight, target_ids, temperature)
    loss, metrics     = grpo_loss(logprobs, entropy=entropy, ...)

with the formulas of those two ops, which name the papers. Natively and by the reference they are just called in turn. By Triton the
gradients are there when the forward returns, since dloss/dlogprob is known as soon as logprob is: dhidden in hidden's dtype,
dweight summed in f32 and in the weight's dtype. Nothing of size [N, V] outlives the forward.

Saved for backward: by Triton dhidden and dweight, which the backward multiplies by the loss's own gradient; else what the two ops
save. Flops: 6NDV by Triton in bf16; 8NDV in f32, natively, and for a sequence-level ratio whose softmax does not fit. Workspace by
Triton: up to SOFTMAX_BYTES and DLOGITS_BYTES (kernels/linear_logprob), flat in N and V.
Siblings: reference.py, function.py and triton_kernel.py here, tests/kernels/test_linear_grpo_loss.py.
"""

from __future__ import annotations

import torch

from kernels import triton_ops
from kernels.checks import FLOATS, check
from kernels.dispatch import Implementation, Op
from kernels.grpo_loss.spec import LossSpec
from kernels.linear_grpo_loss.function import linear_grpo_loss_triton
from kernels.linear_grpo_loss.reference import in_turn, make_inputs
from kernels.native import DTYPES, cpu_why_not

__all__ = ["OP", "linear_grpo_loss", "make_inputs"]

triton_ops.register("linear_grpo_loss", {
    "linear_grpo_loss": "(Tensor(a!) loss, Tensor(b!) metrics, Tensor(c!) logprobs, Tensor(d!) dhidden, Tensor(e!) dweight, "
                        "Tensor hidden, Tensor weight, Tensor target_ids, Tensor old_logprobs, Tensor advantages, "
                        "Tensor sequence_index, Tensor? rollout_logprobs, Tensor? ref_logprobs, float temperature, int[] choices, "
                        "int[] counts, float[] numbers) -> ()"})
OP = Op("linear_grpo_loss", (
    Implementation("native", in_turn("native", "native"), cpu_why_not, DTYPES),
    Implementation("triton", linear_grpo_loss_triton, triton_ops.why_not, triton_ops.DTYPES),
    Implementation("reference", in_turn("reference", "reference")),
    Implementation("torch", in_turn("torch", "auto"), is_automatic=False)))


def linear_grpo_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target_ids: torch.Tensor,
    temperature: float = 1.0,
    *,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    sequence_index: torch.Tensor,
    num_sequences: int,
    spec: LossSpec,
    total_loss_tokens: int,
    total_sequences: int,
    rollout_logprobs: torch.Tensor | None = None,
    ref_logprobs: torch.Tensor | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    """hidden, weight, target_ids, temperature as in `linear_logprob`, the others as in `grpo_loss`, which also name what is wrong
    -> (loss f32[], metrics f32[] each, logprobs f32[N], the last two detached). Differentiable in hidden and weight."""
    check("linear_grpo_loss", "hidden", hidden, ("N", "D"), FLOATS)
    loss, metrics, logprobs = OP.choose(hidden, impl).run(
        hidden, weight, target_ids, temperature, old_logprobs=old_logprobs, advantages=advantages, sequence_index=sequence_index,
        num_sequences=num_sequences, spec=spec, total_loss_tokens=total_loss_tokens, total_sequences=total_sequences,
        rollout_logprobs=rollout_logprobs, ref_logprobs=ref_logprobs)
    return loss, metrics, logprobs
