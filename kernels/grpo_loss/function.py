"""`grpo_loss` as an autograd.Function. One op writes loss, gradients and metrics; the backward pass scales
the saved gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from kernels.grpo_loss.inputs import LossInputs
from kernels.grpo_loss.spec import CHOICES, LossSpec

METRICS = ("loss_sum", "clip_low_sum", "clip_high_sum", "clip_dual_sum", "importance_cut_sum", "num_tokens_sum", "approx_kl_sum",
           "w_sum", "w_sq_sum", "kl_sum", "entropy_sum", "ratio_max", "ratio_min", "logprob_gap_max")
"""In the order of csrc/grpo_loss/cpu.cpp and triton_kernel.py."""
NUMBERS = ("clip_low", "clip_high", "dual_clip", "kl_coef", "importance_low", "importance_high", "entropy_coef")


def choices_of(spec: LossSpec) -> list[int]:
    return [allowed.index(getattr(spec, name)) for name, allowed in CHOICES.items()]


def numbers_of(spec: LossSpec) -> list[float]:
    return [float(getattr(spec, name)) for name in NUMBERS]


def counts_of(inputs: LossInputs, spec: LossSpec) -> list[int]:
    return [inputs.num_sequences, inputs.total_loss_tokens, inputs.total_sequences, spec.constant_length]


def tensors_of(inputs: LossInputs) -> list[torch.Tensor | None]:
    """The five tensors of LossInputs, in the order of the ops' schemas, contiguous."""
    tensors = (inputs.old_logprobs, inputs.advantages, inputs.sequence_index, inputs.rollout_logprobs, inputs.ref_logprobs)
    return [None if x is None else x.detach().contiguous() for x in tensors]


def named_metrics(metrics: torch.Tensor, inputs: LossInputs, spec: LossSpec, has_entropy: bool) -> dict[str, torch.Tensor]:
    """metrics f32[14] -> by name, without those whose inputs were not given."""
    absent = {
        "importance_cut_sum": spec.importance == "none", "kl_sum": inputs.ref_logprobs is None,
        "entropy_sum": not has_entropy, "logprob_gap_max": inputs.rollout_logprobs is None,
    }
    return {name: value for name, value in zip(METRICS, metrics.unbind(), strict=True) if not absent.get(name)}


def grpo_loss_by(ops: Any) -> Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """The op by `ops.grpo_loss`; ops: torch.ops.reason_rl or torch.ops.reason_rl_triton."""

    class GrpoLoss(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any, logprobs: torch.Tensor, entropy: torch.Tensor | None, constants: list[torch.Tensor | None],
            spec: LossSpec, counts: list[int],
        ) -> tuple[torch.Tensor, torch.Tensor]:
            loss, metrics, dlogprobs, dentropy = (
                torch.empty(shape, dtype=torch.float32, device=logprobs.device)
                for shape in ((), (len(METRICS),), logprobs.shape, logprobs.shape if spec.entropy_coef != 0 else (0,)))
            ops.grpo_loss(
                loss, metrics, dlogprobs, dentropy, logprobs.contiguous(), *constants,
                None if entropy is None else entropy.contiguous(), choices_of(spec), counts, numbers_of(spec))
            ctx.save_for_backward(dlogprobs, dentropy if spec.entropy_coef != 0 else None)
            ctx.mark_non_differentiable(metrics)
            return loss, metrics

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            dlogprobs, dentropy = ctx.saved_tensors
            return dlogprobs * grads[0], None if dentropy is None else dentropy * grads[0], None, None, None

    def grpo_loss(
        logprobs: torch.Tensor, inputs: LossInputs, spec: LossSpec, entropy: torch.Tensor | None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss, metrics = GrpoLoss.apply(logprobs, entropy, tensors_of(inputs), spec, counts_of(inputs, spec))
        return loss, named_metrics(metrics, inputs, spec, entropy is not None)

    return grpo_loss
