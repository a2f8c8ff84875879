"""`linear_grpo_loss` as an autograd.Function over Triton's op, which writes loss, metrics, logprobs and both gradients: the
backward scales what was kept."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from kernels.grpo_loss import check_inputs as check_loss_inputs
from kernels.grpo_loss.function import METRICS, choices_of, named_metrics, numbers_of
from kernels.grpo_loss.spec import LossSpec
from kernels.linear_grpo_loss.reference import Result
from kernels.linear_logprob import check_inputs as check_logprob_inputs
from kernels.triton_ops import OPS


class LinearGrpoLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, target_ids: torch.Tensor, temperature: float,
        constants: list[torch.Tensor | None], spec: LossSpec, counts: list[int], is_wanted: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        hidden, weight, target_ids = hidden.contiguous(), weight.contiguous(), target_ids.contiguous()
        loss, metrics, logprobs, dweight = (torch.empty(shape, dtype=torch.float32, device=hidden.device) for shape in (
            (), (len(METRICS),), hidden.shape[:1], weight.shape if is_wanted else (0,)))
        dhidden = torch.empty_like(hidden) if is_wanted else hidden.new_empty(0)
        constants = [None if x is None else x.detach().contiguous() for x in constants]
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
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target_ids: torch.Tensor,
    temperature: float,
    *,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    sequence_index: torch.Tensor,
    num_sequences: int,
    spec: LossSpec,
    total_loss_tokens: int,
    total_sequences: int,
    rollout_logprobs: torch.Tensor | None,
    ref_logprobs: torch.Tensor | None,
) -> Result:
    check_logprob_inputs(hidden, weight, target_ids, temperature)
    like = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)  # what the logprobs will be, and the entropy
    check_loss_inputs(
        like, {"old_logprobs": old_logprobs, "advantages": advantages},
        {"rollout_logprobs": rollout_logprobs, "ref_logprobs": ref_logprobs, "entropy": like}, spec, sequence_index, num_sequences,
        total_loss_tokens, total_sequences)
    loss, metrics, logprobs = LinearGrpoLoss.apply(
        hidden, weight, target_ids, temperature, [old_logprobs, advantages, sequence_index, rollout_logprobs, ref_logprobs], spec,
        [num_sequences, total_loss_tokens, total_sequences, spec.constant_length],
        torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad))
    return loss, named_metrics(metrics, spec, rollout_logprobs, ref_logprobs, like), logprobs
