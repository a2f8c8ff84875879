"""`linear_grpo_loss`: from the last hidden states to the policy loss and its gradients (steps 6 and 7).

    logprobs, entropy = linear_logprob(hidden, weight, target_ids, temperature)
    loss, metrics     = grpo_loss(logprobs, inputs, spec, entropy)

with the formulas of those two ops, which name the papers. Native and reference call the two ops in turn.
Triton computes the gradients in the forward pass, since dloss/dlogprob follows as soon as logprob does:
dhidden in hidden's dtype, dweight summed in f32 and stored in the weight's dtype. Nothing of size [N, V]
outlives the forward pass.

Saved for backward: by Triton dhidden and dweight, which the backward pass scales; else the tensors that the
two ops save.
Flops: 6NDV by Triton in bf16; 8NDV in f32, by native, and for a sequence-level ratio whose softmax exceeds
its budget. Workspace of Triton: up to SOFTMAX_BYTES and DLOGITS_BYTES (kernels/linear_logprob), constant in N
and V.
A surrogate without a kernel (kernels/grpo_loss/surrogates.py) runs as "in_turn": linear_logprob by its
kernel, grpo_loss by its reference.
Siblings: reference.py, function.py and triton_kernel.py here, tests/kernels/test_linear_grpo_loss.py.
"""

from __future__ import annotations

import torch

from kernels import triton_ops
from kernels.checks import FLOATS, check
from kernels.dispatch import Implementation, Op
from kernels.grpo_loss import LossInputs, LossSpec
from kernels.grpo_loss.spec import CHOICES
from kernels.linear_grpo_loss.function import linear_grpo_loss_triton
from kernels.linear_grpo_loss.reference import in_turn, make_inputs
from kernels.native import DTYPES, cpu_unsupported_reason

__all__ = ["OP", "linear_grpo_loss", "make_inputs"]

triton_ops.register("linear_grpo_loss", {
    "linear_grpo_loss": "(Tensor(a!) loss, Tensor(b!) metrics, Tensor(c!) logprobs, Tensor(d!) dhidden, Tensor(e!) dweight, "
                        "Tensor hidden, Tensor weight, Tensor target_ids, Tensor old_logprobs, Tensor advantages, "
                        "Tensor sequence_index, Tensor? rollout_logprobs, Tensor? ref_logprobs, float temperature, int[] choices, "
                        "int[] counts, float[] numbers) -> ()"})
SURROGATES = CHOICES["surrogate"]
OP = Op("linear_grpo_loss", (
    Implementation("native", in_turn("native", "native"), cpu_unsupported_reason, DTYPES, SURROGATES),
    Implementation("triton", linear_grpo_loss_triton, triton_ops.unsupported_reason, triton_ops.DTYPES, SURROGATES),
    Implementation("in_turn", in_turn("auto", "auto")),
    Implementation("reference", in_turn("reference", "reference")),
    Implementation("torch", in_turn("torch", "auto"), is_automatic=False)))


def linear_grpo_loss(
    hidden: torch.Tensor, weight: torch.Tensor, target_ids: torch.Tensor, inputs: LossInputs, spec: LossSpec,
    temperature: float = 1.0, impl: str = "auto",
) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    """hidden, weight, target_ids and temperature as in `linear_logprob`, inputs and spec as in `grpo_loss`;
    those two raise the errors -> (loss f32[], metrics f32[] each, logprobs f32[N]; the last two detached).
    Differentiable in hidden and weight."""
    check("linear_grpo_loss", "hidden", hidden, ("N", "D"), FLOATS)
    loss, metrics, logprobs = OP.choose(hidden, impl, spec.surrogate).run(hidden, weight, target_ids, inputs, spec, temperature)
    return loss, metrics, logprobs
