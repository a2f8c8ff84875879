"""`linear_grpo_loss` as an autograd.Function over Triton's op, which writes loss, metrics, logprobs and both
gradients. The backward pass scales the saved gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from kernels.grpo_loss import LossInputs, LossSpec
from kernels.grpo_loss import check_inputs as check_loss_inputs
from kernels.grpo_loss.function import METRICS, choices_of, counts_of, named_metrics, numbers_of, tensors_of
from kernels.linear_grpo_loss.reference import Result
from kernels.linear_logprob import check_inputs as check_logprob_inputs
from kernels.triton_ops import OPS


class LinearGrpoLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, target_ids: torch.Tensor, temperature: float,
        constants: list[torch.Tensor | None], spec: LossSpec, counts: list[int], needs_grad: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        hidden, weight, target_ids = hidden.contiguous(), weight.contiguous(), target_ids.contiguous()
        loss, metrics, logprobs, dweight = (torch.empty(shape, dtype=torch.float32, device=hidden.device) for shape in (
            (), (len(METRICS),), hidden.shape[:1], weight.shape if needs_grad else (0,)))
        dhidden = torch.empty_like(hidden) if needs_grad else hidden.new_empty(0)
        OPS.linear_grpo_loss(loss, metrics, logprobs, dhidden, dweight, hidden, weight, target_ids, *constants, temperature,
                             choices_of(spec), counts, numbers_of(spec))
        ctx.save_for_backward(dhidden, dweight.to(weight.dtype))
        ctx.mark_non_differentiable(metrics, logprobs)
        return loss, metrics, logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dhidden, dweight = ctx.saved_tensors
        return dhidden * grads[0], dweight * grads[0], None, None, None, None, None, None


def linear_grpo_loss_triton(
    hidden: torch.Tensor, weight: torch.Tensor, target_ids: torch.Tensor, inputs: LossInputs, spec: LossSpec, temperature: float
) -> Result:
    check_logprob_inputs(hidden, weight, target_ids, temperature)
    placeholder = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)  # for logprobs and entropy
    check_loss_inputs(placeholder, inputs, spec, entropy=placeholder)
    loss, metrics, logprobs = LinearGrpoLoss.apply(
        hidden, weight, target_ids, temperature, tensors_of(inputs), spec, counts_of(inputs, spec),
        torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad))
    return loss, named_metrics(metrics, inputs, spec, has_entropy=True), logprobs
