"""grpo_loss in plain torch: the specification of every other implementation.

The op in `kernels/grpo_loss/__init__.py` calls it after its contract checks; the formulas are in that
docstring, the surrogates in surrogates.py. `make_inputs` gives the named cases of tests and benches. Left
out: the checks, and merging metrics (metrics.py).

All differentiated arithmetic is elementwise in f32|f64[N]. Sums over a sequence are of constants alone, and
run per segment in a fixed order, so that two runs give the same bits. Letters: N loss tokens, S sequences of
this microbatch.
"""

from __future__ import annotations

from typing import Any

import torch

from kernels.grpo_loss.inputs import LossInputs
from kernels.grpo_loss.spec import LossSpec
from kernels.grpo_loss.surrogates import find_surrogate

MAX_LOG_RATIO = 20.0
"""exp(20) is 4.9e8. A larger ratio may reach inf, whose gradient is NaN even in the branch that min() leaves
out."""


def grpo_loss_reference(
    logprobs: torch.Tensor, inputs: LossInputs, spec: LossSpec, entropy: torch.Tensor | None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """logprobs, entropy f32|f64[N] -> (loss [], metrics of [] each)."""
    # Ratios, per token or per sequence.
    old_logprobs, advantages = inputs.old_logprobs.detach(), inputs.advantages.detach()
    index, lengths = inputs.sequence_index, _lengths(inputs.sequence_index, inputs.num_sequences)
    log_ratio = logprobs - old_logprobs
    ratio = _exp(_at_level(log_ratio, index, lengths) if spec.ratio == "sequence" else log_ratio)

    # The loss of each token: importance * surrogate + KL penalty - entropy bonus.
    token_loss, clips = find_surrogate(spec.surrogate)(logprobs, ratio, advantages, spec)
    flags = {f"clip_{clip}_sum": clips.get(clip) for clip in ("low", "high", "dual")}
    if spec.importance != "none":
        assert inputs.rollout_logprobs is not None
        mismatch = old_logprobs - inputs.rollout_logprobs.detach()
        importance, flags["importance_cut_sum"] = _importance(
            _at_level(mismatch, index, lengths) if spec.ratio == "sequence" else mismatch, spec)
        token_loss = importance * token_loss
    if spec.kl_coef > 0:
        assert inputs.ref_logprobs is not None
        token_loss = token_loss + spec.kl_coef * _kl(logprobs, inputs.ref_logprobs.detach(), spec.kl_estimator)
    if spec.entropy_coef != 0:
        assert entropy is not None
        token_loss = token_loss - spec.entropy_coef * entropy

    # This microbatch's share of the batch's loss, and the metrics.
    loss = (token_loss * _weights(token_loss, lengths, inputs, spec)).sum()
    with torch.no_grad():
        none = loss.new_zeros(())
        metrics = {"loss_sum": loss.detach()}
        metrics |= {name: none if flag is None else flag.sum().to(loss.dtype) for name, flag in flags.items()}
        metrics |= _metrics(logprobs, log_ratio, ratio, inputs, entropy)
    return loss, metrics


def _lengths(sequence_index: torch.Tensor, num_sequences: int) -> torch.Tensor:
    """i32|i64[N] -> i64[S]: tokens of each sequence. A sum of integers, so exact in any order."""
    lengths = torch.zeros(num_sequences, dtype=torch.int64, device=sequence_index.device)
    return lengths.index_add(0, sequence_index, torch.ones_like(sequence_index, dtype=torch.int64))


def _exp(log_ratio: torch.Tensor) -> torch.Tensor:
    return log_ratio.clamp(max=MAX_LOG_RATIO).exp()


def _at_level(log_ratio: torch.Tensor, sequence_index: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """[N] -> [N]: the value at each token is the mean over its sequence; the gradient goes to the token's own
    logprob, undivided.

    This is GSPO-token, arXiv:2507.18071 eq. 14. Its gradient equals that through the mean if all len terms of
    a sequence are equal: each term passes 1/len of its gradient to every token, so a token gets len * 1/len = 1
    of it. This form needs no scatter in the backward pass, whose order of addition varies on a GPU.
    """
    constant = log_ratio.detach()
    sums = torch.segment_reduce(constant, "sum", lengths=lengths, initial=0, unsafe=True)  # [S]; unsafe: no device sync
    means = sums / lengths.clamp(min=1)
    return means.index_select(0, sequence_index) + (log_ratio - constant)


def _importance(log_weight: torch.Tensor, spec: LossSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """-> (constant weights [N], bool[N]: truncated or masked)."""
    weight = _exp(log_weight)
    if spec.importance == "tis":
        return weight.clamp(max=spec.importance_high), weight > spec.importance_high
    is_out = (weight < spec.importance_low) | (weight > spec.importance_high)
    return weight.masked_fill(is_out, 0.0), is_out


def _kl(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, estimator: str) -> torch.Tensor:
    d = ref_logprobs - logprobs
    if estimator == "k1":
        return -d
    if estimator == "k2":
        return d.square() / 2
    return _k3(d)


def _k3(d: torch.Tensor) -> torch.Tensor:
    d = d.clamp(max=MAX_LOG_RATIO)
    return d.expm1() - d  # expm1: exp(d) - 1 would lose all digits of a small d in f32


def _weights(like: torch.Tensor, lengths: torch.Tensor, inputs: LossInputs, spec: LossSpec) -> torch.Tensor:
    """The constant weight [N] of each token's loss in the batch's loss."""
    if spec.normalizer == "token":
        return torch.full_like(like, 1 / max(inputs.total_loss_tokens, 1))
    if spec.normalizer == "constant":
        return torch.full_like(like, 1 / (max(inputs.total_sequences, 1) * spec.constant_length))
    return 1 / (lengths.index_select(0, inputs.sequence_index).to(like.dtype) * inputs.total_sequences)


def _metrics(
    logprobs: torch.Tensor, log_ratio: torch.Tensor, ratio: torch.Tensor, inputs: LossInputs, entropy: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """metrics.py defines each. Without tokens, extremes are -inf and inf, the neutral elements of merging."""
    # Ratios between the current policy and the policies that sampled.
    edge = logprobs.new_tensor([torch.inf])
    gap = log_ratio if inputs.rollout_logprobs is None else logprobs - inputs.rollout_logprobs
    weight = _exp(gap)  # the current policy over the policy that sampled
    metrics = {
        "num_tokens_sum": logprobs.new_tensor(float(logprobs.numel())),
        "ratio_max": torch.cat([ratio, -edge]).amax(),
        "ratio_min": torch.cat([ratio, edge]).amin(),
        "approx_kl_sum": _k3(log_ratio).sum(),
        "w_sum": weight.sum(),
        "w_sq_sum": weight.square().sum(),
    }
    # Metrics of the optional inputs.
    if inputs.rollout_logprobs is not None:
        metrics["logprob_gap_max"] = torch.cat([gap.abs(), -edge]).amax()
    if inputs.ref_logprobs is not None:
        metrics["kl_sum"] = _k3(inputs.ref_logprobs - logprobs).sum()
    if entropy is not None:
        metrics["entropy_sum"] = entropy.sum()
    return metrics


def make_inputs(device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, dict[str, Any]]:
    """Name -> {"logprobs", "entropy", and the fields of LossInputs}; the totals count this microbatch
    alone."""
    lengths = {
        "one_token": [1],
        "uneven": [5, 1, 0, 17, 3, 8],
        "empty": [],
        "step": [64] * 128,
        "large": [4096] * 256,
    }
    return {name: make_case(name, counts, torch.device(device), dtype) for name, counts in lengths.items()}


def make_case(name: str, lengths: list[int], device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Sequences of these lengths; `name` seeds the draws."""
    generator = torch.Generator().manual_seed(sum(name.encode()))
    num_loss_tokens, num_sequences = sum(lengths), len(lengths)

    def normal(scale: float, size: int = num_loss_tokens) -> torch.Tensor:
        return scale * torch.randn(size, generator=generator, dtype=torch.float64)

    index = torch.repeat_interleave(torch.arange(num_sequences), torch.tensor(lengths, dtype=torch.int64))
    rollout = -normal(1.5).abs()
    old = rollout + normal(0.05)
    logprobs = old + normal(0.3)  # wide enough that both clips bind at some tokens
    tensors = {
        "logprobs": logprobs, "old_logprobs": old, "rollout_logprobs": rollout, "ref_logprobs": logprobs + normal(0.5),
        "advantages": normal(1.0, num_sequences).index_select(0, index), "entropy": normal(1.0).abs(),
    }
    return {
        **{key: value.to(device, dtype) for key, value in tensors.items()},
        "sequence_index": index.to(device, torch.int32), "num_sequences": num_sequences,
        "total_loss_tokens": num_loss_tokens, "total_sequences": num_sequences,
    }
