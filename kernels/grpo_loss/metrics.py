"""What grpo_loss measured: merged over microbatches and ranks by each name's suffix, then finished into plain
numbers.

The loss gives every microbatch the same names; `_sum` adds, `_max` and `_min` take the extreme, so any order
and grouping will do. Left out: moving them between processes (the trainer's all-reduce goes by the same
suffixes).

From the loss, over the loss tokens of one microbatch:
    loss_sum            the microbatch's share of the loss: the shares add up to the batch's loss
    num_tokens_sum      loss tokens
    clip_low_sum, clip_high_sum, clip_dual_sum     tokens whose objective that clip changes
    importance_cut_sum  tokens whose importance weight was truncated (tis) or masked (icepop); with importance on
    ratio_max, ratio_min                           at the spec's level, token or sequence
    approx_kl_sum       k3 of the step so far, old policy against current, token level
    kl_sum              k3 of current policy against reference; with ref_logprobs
    entropy_sum         nats; with entropy
    w_sum, w_sq_sum     w = exp(logprob - rollout_logprob), or old_logprob where there is none: for `ess`
    logprob_gap_max     largest |logprob - rollout_logprob|, nats; with rollout_logprobs
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

REDUCTIONS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "_sum": torch.add, "_max": torch.maximum, "_min": torch.minimum,
}
# Finished name -> the sum that is divided by the number of tokens.
MEANS = {
    "clip_low_fraction": "clip_low_sum", "clip_high_fraction": "clip_high_sum", "clip_dual_fraction": "clip_dual_sum",
    "importance_cut_fraction": "importance_cut_sum",
    "approx_kl": "approx_kl_sum", "kl": "kl_sum", "entropy": "entropy_sum",
}


def merge_metrics(metrics: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Scalar tensors of several microbatches -> f64 scalar tensors of their union, on the same device."""
    if not metrics:
        raise ValueError("merge_metrics: expected at least one microbatch's metrics, got none")
    merged = {name: value.double() for name, value in metrics[0].items()}
    for other in metrics[1:]:
        if other.keys() != merged.keys():
            raise ValueError("merge_metrics: all microbatches must have the same names, got "
                             f"{sorted(merged)} and {sorted(other)}")
        for name, value in other.items():
            merged[name] = _reduction(name)(merged[name], value.double())
    return merged


def _reduction(name: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    for suffix, reduction in REDUCTIONS.items():
        if name.endswith(suffix):
            return reduction
    raise ValueError(f"merge_metrics: a metric's name must end in one of {list(REDUCTIONS)}, got {name!r}")


def finish_metrics(merged: dict[str, torch.Tensor]) -> dict[str, float]:
    """Means per loss token, extremes, and `ess`, the effective sample size as a share of the tokens (1 when
    on policy).

    ess = (sum w)^2 / (N sum w^2), Kish. Without any token the means are 0, and extremes and ess are left out.
    """
    values = {name: float(value) for name, value in merged.items()}
    num_tokens = values["num_tokens_sum"]
    finished = {"loss": values["loss_sum"], "num_loss_tokens": num_tokens}
    finished |= {name: values[total] / max(num_tokens, 1.0) for name, total in MEANS.items() if total in values}
    if num_tokens:
        finished |= {name: value for name, value in values.items() if name.endswith(("_max", "_min"))}
        # All weights may underflow to 0 on a policy that has left its rollouts for good: no sample is then
        # effective.
        finished["ess"] = values["w_sum"] ** 2 / (num_tokens * values["w_sq_sum"]) if values["w_sq_sum"] else 0.0
    return finished
