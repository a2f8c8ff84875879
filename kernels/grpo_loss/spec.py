"""`LossSpec`: every choice of the policy-gradient loss, in one frozen value that all implementations read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kernels.grpo_loss.surrogates import SpecError, find_surrogate

CHOICES = {
    "ratio": ("token", "sequence"), "surrogate": ("clip", "cispo", "reinforce"), "kl_estimator": ("k1", "k2", "k3"),
    "importance": ("none", "tis", "icepop"), "normalizer": ("token", "sequence", "constant"),
}
"""The values that the kernels implement; they get each as its position here (csrc/grpo_loss/cpu.cpp has the
same order)."""


@dataclass(frozen=True)
class LossSpec:
    """The loss of one GRPO-family algorithm. `grpo_loss` has the formula of each choice."""

    ratio: Literal["token", "sequence"] = "token"
    """"token": exp(logprob - old_logprob) per token (PPO, GRPO). "sequence": its geometric mean over the
    completion (GSPO)."""
    surrogate: str = "clip"
    """"clip": min(ratio * A, clip(ratio) * A). "cispo": stop_gradient(clip(ratio)) * A * logprob.
    "reinforce": A * logprob. These are maximised; the loss is the negative. "module:function": your own, see
    surrogates.py."""
    clip_low: float = 0.2
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio is clipped above at 1 + clip_high; larger than clip_low is DAPO's clip-higher."""
    dual_clip: float = 0.0
    """For "clip" alone: where A < 0 the objective is at least dual_clip * A (arXiv:1912.09729); 0: off, else
    > 1."""
    kl_coef: float = 0.0
    """Weight of the KL penalty to the frozen reference policy, added to the loss per token."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Schulman's estimators with d = ref_logprob - logprob: k1 = -d, k2 = d^2 / 2, k3 = exp(d) - 1 - d."""
    importance: Literal["none", "tis", "icepop"] = "none"
    """Weight on the surrogate for a sampler that differs from old_logprob's policy, w = exp(old_logprob -
    rollout_logprob) per token, or its geometric mean where `ratio` is "sequence": "tis" truncates w at
    importance_high; "icepop" sets a w outside [importance_low, importance_high] to 0."""
    importance_low: float = 0.5
    importance_high: float = 2.0
    entropy_coef: float = 0.0
    """Weight of the entropy bonus, subtracted from the loss per token."""
    normalizer: Literal["token", "sequence", "constant"] = "token"
    """"token": 1 / all loss tokens (DAPO). "sequence": mean over each completion's tokens, then over
    completions (GRPO, GSPO). "constant": 1 / (completions * constant_length) (Dr. GRPO)."""
    constant_length: int = 0
    """The length that "constant" divides by; the trainer replaces 0 by sampling.max_tokens."""

    def __post_init__(self) -> None:
        # Names.
        find_surrogate(self.surrogate)
        for name, allowed in CHOICES.items():
            if name != "surrogate" and getattr(self, name) not in allowed:
                raise SpecError(f"loss.{name} must be one of {list(allowed)}, got {getattr(self, name)!r}")
        # Ranges.
        if not 0 <= self.clip_low <= 1:
            raise SpecError(f"loss.clip_low must be in [0, 1], got {self.clip_low}")
        if self.clip_high < 0:
            raise SpecError(f"loss.clip_high must be >= 0, got {self.clip_high}")
        if self.dual_clip != 0 and self.dual_clip <= 1:
            raise SpecError(f"loss.dual_clip must be 0 (off) or above 1, got {self.dual_clip}")
        if self.kl_coef < 0:
            raise SpecError(f"loss.kl_coef must be >= 0, got {self.kl_coef}")
        if not 0 <= self.importance_low < self.importance_high:
            raise SpecError(
                f"loss.importance_low must be in [0, importance_high), got {self.importance_low} "
                f"and {self.importance_high}"
            )
