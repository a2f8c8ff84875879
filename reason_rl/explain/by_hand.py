"""The advantages and the loss of a step in float64, from the formulas, to compare with the step's own numbers.

Written for one reader and a few hundred tokens; `kernels/group_advantage` and `kernels/grpo_loss` document the formulas.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kernels.grpo_loss import LossInputs, LossSpec
from kernels.grpo_loss.surrogates import find_surrogate

ADVANTAGE_EPS = 1e-6
"""`group_advantage`'s default."""
MAX_LOG_RATIO = 20.0


def advantage(reward: float, group: Sequence[float], batch: Sequence[float], kind: str) -> tuple[str, float]:
    """group, batch: the graded rewards of the group and of the whole step -> (the formula with its numbers, its value)."""
    mean = statistics.fmean(group)
    centered, words = reward - mean, f"{reward:.6g} − {mean:.6g}"
    if kind == "mean" or len(group) < 2:
        return words, centered
    if kind == "leave_one_out":
        others = (sum(group) - reward) / (len(group) - 1)
        return f"{reward:.6g} − {others:.6g}", reward - others
    std = statistics.stdev(group if kind == "std" else batch)
    return f"({words}) / ({std:.6g} + {ADVANTAGE_EPS:g})", centered / (std + ADVANTAGE_EPS)


@dataclass(frozen=True)
class Terms:
    """The loss's terms, f64[N] each."""

    ratio: torch.Tensor
    surrogate: torch.Tensor
    """Before the importance weight."""
    importance: torch.Tensor
    penalty: torch.Tensor
    """kl_coef * KL - entropy_coef * entropy."""
    weight: torch.Tensor
    """The normalizer's."""
    value: torch.Tensor
    """weight * (importance * surrogate + penalty): their sum is the loss."""
    clips: list[str]
    """Of each token, "low", "high" or "dual" if that clip changed its term, else ""."""


def terms_of(logprobs: torch.Tensor, inputs: LossInputs, spec: LossSpec, entropy: torch.Tensor | None) -> Terms:
    """logprobs, entropy f32[N] -> the terms of one microbatch's loss."""
    index, num_sequences = inputs.sequence_index.long(), inputs.num_sequences
    lengths = torch.bincount(index, minlength=num_sequences).double()  # [S]
    now, old, advantages = logprobs.double(), inputs.old_logprobs.double(), inputs.advantages.double()

    def exp(gap: torch.Tensor) -> torch.Tensor:
        if spec.ratio == "sequence":
            gap = (gap.new_zeros(num_sequences).index_add(0, index, gap) / lengths)[index]  # the sequence's mean
        return gap.clamp(max=MAX_LOG_RATIO).exp()

    # Ratio, and how much better that makes the objective.
    ratio = exp(now - old)
    surrogate, flags = find_surrogate(spec.surrogate)(now, ratio, advantages, spec)
    clips = [next((name for name, flag in flags.items() if flag[n]), "") for n in range(len(now))]

    # The weight for a sampler that differs from the old policy.
    importance = torch.ones_like(now)
    if spec.importance != "none":
        assert inputs.rollout_logprobs is not None
        importance = exp(old - inputs.rollout_logprobs.double())
        is_out = (importance < spec.importance_low) | (importance > spec.importance_high)
        importance = importance.clamp(max=spec.importance_high) if spec.importance == "tis" else importance.masked_fill(is_out, 0.0)

    # KL penalty and entropy bonus.
    penalty = torch.zeros_like(now)
    if spec.kl_coef > 0:
        assert inputs.ref_logprobs is not None
        d = inputs.ref_logprobs.double() - now
        penalty = spec.kl_coef * {"k1": -d, "k2": d**2 / 2, "k3": d.clamp(max=MAX_LOG_RATIO).exp() - 1 - d}[spec.kl_estimator]
    if spec.entropy_coef != 0:
        assert entropy is not None
        penalty = penalty - spec.entropy_coef * entropy.double()

    # The normalizer.
    denominator = {"token": torch.full_like(now, inputs.total_loss_tokens),
                   "sequence": lengths[index] * inputs.total_sequences,
                   "constant": torch.full_like(now, inputs.total_sequences * spec.constant_length)}[spec.normalizer]
    value = (importance * surrogate + penalty) / denominator
    return Terms(ratio, surrogate, importance, penalty, 1 / denominator, value, clips)
