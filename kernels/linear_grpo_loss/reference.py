"""The specification of `linear_grpo_loss`: linear_logprob, then grpo_loss. The native implementation is the
same composition: both native ops keep nothing of size [N, V], and only N numbers pass between their backward
passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kernels.grpo_loss import LossInputs, LossSpec, grpo_loss
from kernels.grpo_loss.reference import make_case
from kernels.linear_logprob import linear_logprob
from kernels.linear_logprob import make_inputs as logprob_inputs

Result = tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]


def in_turn(logprob_impl: str, loss_impl: str) -> Callable[..., Result]:
    """The two ops by these implementations, joined by autograd."""

    def run(
        hidden: torch.Tensor, weight: torch.Tensor, target_ids: torch.Tensor, inputs: LossInputs, spec: LossSpec, temperature: float
    ) -> Result:
        logprobs, entropy = linear_logprob(hidden, weight, target_ids, temperature, impl=logprob_impl)
        loss, metrics = grpo_loss(logprobs, inputs, spec, entropy, impl=loss_impl)
        return loss, metrics, logprobs.detach()

    return run


def make_inputs(
    lengths: list[int], hidden_size: int, vocab_size: int, dtype: torch.dtype, device: str = "cpu"
) -> dict[str, Any]:
    """{"hidden", "weight", "target_ids", and the fields of LossInputs} for sequences of these lengths.
    old_logprobs lie around the logprobs, so ratios lie around 1."""
    given = make_case("linear", lengths, torch.device(device), torch.float32)
    drift = {name: given[name] - given["logprobs"] for name in ("old_logprobs", "rollout_logprobs", "ref_logprobs")}
    inputs = logprob_inputs(len(given["logprobs"]), hidden_size, vocab_size, dtype, device)
    logprobs, _ = linear_logprob(inputs["hidden"], inputs["weight"], inputs["target_ids"])
    del given["logprobs"], given["entropy"]
    return inputs | given | {name: logprobs + gap for name, gap in drift.items()}
