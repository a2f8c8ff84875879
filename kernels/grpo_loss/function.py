"""`grpo_loss` as an autograd.Function over one op that writes loss, gradients and metrics; the backward scales what was kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from kernels.grpo_loss.spec import LossSpec

METRICS = ("loss_sum", "clip_low_sum", "clip_high_sum", "clip_dual_sum", "importance_cut_sum", "num_tokens_sum", "approx_kl_sum",
           "w_sum", "w_sq_sum", "kl_sum", "entropy_sum", "ratio_max", "ratio_min", "logprob_gap_max")
"""In the order of csrc/grpo_loss/cpu.cpp and triton_kernel.py; the choices below are numbers in the order of their words."""
CHOICES = {
    "ratio": ("token", "sequence"), "surrogate": ("clip", "cispo", "reinforce"), "kl_estimator": ("k1", "k2", "k3"),
    "importance": ("none", "tis", "icepop"), "normalizer": ("token", "sequence", "constant"),
}
NUMBERS = ("clip_low", "clip_high", "dual_clip", "kl_coef", "importance_low", "importance_high", "entropy_coef")


def choices_of(spec: LossSpec) -> list[int]:
    return [allowed.index(getattr(spec, name)) for name, allowed in CHOICES.items()]


def numbers_of(spec: LossSpec) -> list[float]:
    return [float(getattr(spec, name)) for name in NUMBERS]


def named_metrics(
    metrics: torch.Tensor, spec: LossSpec, rollout_logprobs: torch.Tensor | None, ref_logprobs: torch.Tensor | None,
    entropy: torch.Tensor | None,
) -> dict[str, torch.Tensor]:
    """metrics f32[14] -> those that the inputs give."""
    absent = {
        "importance_cut_sum": spec.importance == "none", "kl_sum": ref_logprobs is None,
        "entropy_sum": entropy is None, "logprob_gap_max": rollout_logprobs is None,
    }
    return {name: value for name, value in zip(METRICS, metrics.unbind(), strict=True) if not absent.get(name)}


def grpo_loss_by(ops: Any) -> Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """ops: has grpo_loss (torch.ops.reason_rl, torch.ops.reason_rl_triton)."""

    class GrpoLoss(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any, logprobs: torch.Tensor, entropy: torch.Tensor | None, constants: list[torch.Tensor | None],
            spec: LossSpec, counts: list[int],
        ) -> tuple[torch.Tensor, torch.Tensor]:
            loss, metrics, dlogprobs, dentropy = (
                torch.empty(shape, dtype=torch.float32, device=logprobs.device)
                for shape in ((), (len(METRICS),), logprobs.shape, logprobs.shape if spec.entropy_coef != 0 else (0,)))
            old, advantages, index, rollout, ref = (None if x is None else x.detach().contiguous() for x in constants)
            ops.grpo_loss(
                loss, metrics, dlogprobs, dentropy, logprobs.contiguous(), old, advantages, index, rollout, ref,
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
        logprobs: torch.Tensor,
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
        entropy: torch.Tensor | None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss, metrics = GrpoLoss.apply(
            logprobs, entropy, [old_logprobs, advantages, sequence_index, rollout_logprobs, ref_logprobs], spec,
            [num_sequences, total_loss_tokens, total_sequences, spec.constant_length])
        return loss, named_metrics(metrics, spec, rollout_logprobs, ref_logprobs, entropy)

    return grpo_loss
