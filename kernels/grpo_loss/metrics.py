"""The metrics of grpo_loss: merged over microbatches and ranks by the suffix of each name, then finished as
plain numbers.

Every microbatch has the same names. `_sum` adds, `_max` and `_min` take the extreme, so the order and
grouping of merging do not matter. Left out: moving metrics between processes (the trainer gathers them).

Over the loss tokens of one microbatch:
    loss_sum            this microbatch's part of the batch's loss
    num_tokens_sum      loss tokens
    clip_low_sum, clip_high_sum, clip_dual_sum     tokens whose objective that clip changes
    importance_cut_sum  tokens whose importance weight was truncated (tis) or masked (icepop); if it is on
    ratio_max, ratio_min                           at the spec's level, token or sequence
    approx_kl_sum       k3 between the old and the current policy, per token
    kl_sum              k3 between the current and the reference policy; with ref_logprobs
    entropy_sum         nats; with entropy
    w_sum, w_sq_sum     w = exp(logprob - rollout_logprob), or - old_logprob without it: for `ess`
    logprob_gap_max     largest |logprob - rollout_logprob|, nats; with rollout_logprobs
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

REDUCTIONS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "_sum": torch.add, "_max": torch.maximum, "_min": torch.minimum,
}
# Finished name -> the sum that it divides by the number of tokens.
MEANS = {
    "clip_low_fraction": "clip_low_sum", "clip_high_fraction": "clip_high_sum", "clip_dual_fraction": "clip_dual_sum",
    "importance_cut_fraction": "importance_cut_sum",
    "approx_kl": "approx_kl_sum", "kl": "kl_sum", "entropy": "entropy_sum",
}


def merge_metrics(metrics: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The scalar tensors of several microbatches -> f64 scalar tensors of all of them, on the same device."""
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
    """Means per loss token, extremes, and `ess`, the effective sample size as a fraction of the tokens (1 on
    policy).

    ess = (sum w)^2 / (N sum w^2) (Kish). Without tokens the means are 0, and extremes and ess are left out.
    """
    values = {name: float(value) for name, value in merged.items()}
    num_tokens = values["num_tokens_sum"]
    finished = {"loss": values["loss_sum"], "num_loss_tokens": num_tokens}
    finished |= {name: values[total] / max(num_tokens, 1.0) for name, total in MEANS.items() if total in values}
    if num_tokens:
        finished |= {name: value for name, value in values.items() if name.endswith(("_max", "_min"))}
        # All weights underflow to 0 if the policy is far from its rollouts: no sample is effective then.
        finished["ess"] = values["w_sum"] ** 2 / (num_tokens * values["w_sq_sum"]) if values["w_sq_sum"] else 0.0
    return finished
