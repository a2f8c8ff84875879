"""grpo_loss: from token logprobs to the scalar that is backpropagated (step 7), for the whole GRPO family.

Siblings: `kernels/grpo_loss/spec.py` (the choices), `kernels/grpo_loss/reference.py` (the specification),
`kernels/grpo_loss/metrics.py` (merging and finishing the metrics), `tests/kernels/test_grpo_loss.py`; each algorithm is
held to its paper in `tests/reason_rl/test_algorithms.py`. The kernels: `kernels/grpo_loss/function.py` and behind it
`triton_kernel.py` there and `csrc/grpo_loss/`.
Left out: logprobs and entropy from hidden states (`kernels/linear_logprob`), advantages (`kernels/group_advantage`).
"""

from __future__ import annotations

import torch

from kernels import triton_ops
from kernels.checks import check
from kernels.dispatch import Implementation, Op
from kernels.grpo_loss.function import grpo_loss_by
from kernels.grpo_loss.metrics import finish_metrics, merge_metrics
from kernels.grpo_loss.reference import grpo_loss_reference, make_inputs
from kernels.grpo_loss.spec import LossSpec
from kernels.native import OPS, cpu_why_not

__all__ = ["OP", "LossSpec", "finish_metrics", "grpo_loss", "make_inputs", "merge_metrics"]

triton_ops.register("grpo_loss", {
    "grpo_loss": "(Tensor(a!) loss, Tensor(b!) metrics, Tensor(c!) dlogprobs, Tensor(d!) dentropy, Tensor logprobs, "
                 "Tensor old_logprobs, Tensor advantages, Tensor sequence_index, Tensor? rollout_logprobs, Tensor? ref_logprobs, "
                 "Tensor? entropy, int[] choices, int[] counts, float[] numbers) -> ()"})
OP = Op("grpo_loss", (
    Implementation("native", grpo_loss_by(OPS), cpu_why_not, (torch.float32,)),
    Implementation("triton", grpo_loss_by(triton_ops.OPS), triton_ops.why_not, (torch.float32,)),
    Implementation("reference", grpo_loss_reference)))


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
    rollout_logprobs: torch.Tensor | None = None,
    ref_logprobs: torch.Tensor | None = None,
    entropy: torch.Tensor | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """This microbatch's share of the policy loss: over microbatches and ranks the shares add up to the batch's loss.

        loss = sum over n of weight[n] * (importance[n] * surrogate[n] + kl_coef * kl[n] - entropy_coef * entropy[n])

    with, for token n of a sequence (a completion) of len tokens, ratio = exp(logprob - old_logprob), or under
    ratio="sequence" exp(mean of logprob - old_logprob over the sequence), and
    clip(x) = min(max(x, 1 - clip_low), 1 + clip_high):

        surrogate   clip        -min(ratio A, clip(ratio) A); with dual_clip c, where A < 0: at most -c A
                                PPO arXiv:1707.06347 eq. 7, GRPO arXiv:2402.03300 eq. 3, DAPO arXiv:2503.14476 eq. 8,
                                GSPO arXiv:2507.18071 eq. 5 and 7, dual clip arXiv:1912.09729; two-sided clip,
                                arXiv:2505.07291, is dual clip with c = its delta above 1 + clip_high
                    cispo       -stop_gradient(clip(ratio)) A logprob           MiniMax-M1 arXiv:2506.13585 eq. 4 and 5
                    reinforce   -A logprob                                      RLOO arXiv:2402.14740
        kl          k1 -d, k2 d^2 / 2, k3 exp(d) - 1 - d, with d = ref_logprob - logprob (Schulman 2020): a plain loss
                    term, value and gradient are the estimator's own (on policy, the expectation of k1's gradient is 0)
        importance  w = exp(old_logprob - rollout_logprob), at the level of the ratio (token or sequence), constant:
                    tis min(w, importance_high); icepop w inside [importance_low, importance_high], 0 outside
        weight      token 1 / total_loss_tokens; sequence 1 / (len * total_sequences);
                    constant 1 / (total_sequences * constant_length)

    Importance weighs the surrogate alone; a masked token stays in the denominator. Under ratio="sequence" the advantage
    is the same at all tokens of a sequence, and the gradient is GSPO's eq. 10: each token gets ratio * A / len of its
    sequence's term. A sequence lies whole in one microbatch; one without tokens adds nothing but to the denominator.
    dual_clip acts on "clip" alone, clip_low and clip_high on "clip" and "cispo".

    Arguments: logprobs, old_logprobs, advantages and the optional rollout_logprobs, ref_logprobs, entropy f32[N] (or
    all f64[N]), in nats; sequence_index i32|i64[N], ascending in 0..num_sequences-1 (its values are checked on the CPU
    only: elsewhere the check would wait for the device, and the Triton kernel makes the loss NaN); total_loss_tokens,
    total_sequences: over all microbatches and all ranks.
    Returns: loss f32[], and detached metrics, f32[] each, for `merge_metrics` and `finish_metrics` (see metrics.py).
    Raises ValueError on shapes, dtypes, and inputs that `spec` needs and did not get.
    Differentiable in logprobs and entropy; all else is constant. Computed in the dtype of logprobs. Log ratios above 20
    count as 20 inside exp (with gradient 0), so that a broken token shows in the metrics, not as NaN in the weights.
    Saved for backward: dloss/dlogprob f32[N], known in the forward (and dloss/dentropy with entropy_coef);
    by the reference a handful.
    Moved: 16 N bytes in, 4 N more for each optional input, 4 N out for dlogprobs.
    """
    given = {"old_logprobs": old_logprobs, "advantages": advantages}
    optional = {"rollout_logprobs": rollout_logprobs, "ref_logprobs": ref_logprobs, "entropy": entropy}
    check_inputs(logprobs, given, optional, spec, sequence_index, num_sequences, total_loss_tokens, total_sequences)
    loss, metrics = OP.choose(logprobs, impl).run(
        logprobs, old_logprobs=old_logprobs, advantages=advantages, sequence_index=sequence_index,
        num_sequences=num_sequences, spec=spec, total_loss_tokens=total_loss_tokens, total_sequences=total_sequences,
        rollout_logprobs=rollout_logprobs, ref_logprobs=ref_logprobs, entropy=entropy,
    )
    return loss, metrics


def check_inputs(
    logprobs: torch.Tensor, given: dict[str, torch.Tensor], optional: dict[str, torch.Tensor | None], spec: LossSpec,
    sequence_index: torch.Tensor, num_sequences: int, total_loss_tokens: int, total_sequences: int,
) -> None:
    """What `grpo_loss` raises, for `linear_grpo_loss` too, whose logprobs are yet to come."""
    check("grpo_loss", "logprobs", logprobs, ("N",), (torch.float32, torch.float64))
    shape = tuple(logprobs.shape)
    for name, tensor in {**given, **optional}.items():
        if tensor is not None or name in given:
            check("grpo_loss", name, tensor, shape, logprobs.dtype, like=logprobs)  # type: ignore[arg-type]
    check("grpo_loss", "sequence_index", sequence_index, shape, (torch.int32, torch.int64), like=logprobs)
    _check_needs(spec, optional)
    _check_counts(sequence_index, num_sequences, total_loss_tokens, total_sequences)


def _check_needs(spec: LossSpec, optional: dict[str, torch.Tensor | None]) -> None:
    for is_on, choice, name in (
        (spec.kl_coef > 0, f"kl_coef={spec.kl_coef}", "ref_logprobs"),
        (spec.importance != "none", f"importance={spec.importance!r}", "rollout_logprobs"),
        (spec.entropy_coef != 0, f"entropy_coef={spec.entropy_coef}", "entropy"),
    ):
        if is_on and optional[name] is None:
            raise ValueError(f"grpo_loss: {choice} needs {name}, got None")
    if spec.normalizer == "constant" and spec.constant_length < 1:
        raise ValueError(f"grpo_loss: normalizer='constant' needs constant_length >= 1, got {spec.constant_length}")


def _check_counts(
    sequence_index: torch.Tensor, num_sequences: int, total_loss_tokens: int, total_sequences: int
) -> None:
    num_loss_tokens = sequence_index.numel()
    if total_loss_tokens < num_loss_tokens:
        raise ValueError(f"grpo_loss: total_loss_tokens must count all microbatches, so at least the {num_loss_tokens} "
                         f"tokens of this one, got {total_loss_tokens}")
    if total_sequences < num_sequences:
        raise ValueError(f"grpo_loss: total_sequences must count all microbatches, so at least the {num_sequences} "
                         f"sequences of this one, got {total_sequences}")
    if num_loss_tokens and num_sequences < 1:
        raise ValueError(f"grpo_loss: num_sequences must be >= 1 for {num_loss_tokens} tokens, got {num_sequences}")
    if sequence_index.is_cpu and num_loss_tokens:
        first, last = int(sequence_index[0]), int(sequence_index[-1])
        if first < 0 or last >= num_sequences or bool((sequence_index.diff() < 0).any()):
            raise ValueError(f"grpo_loss: sequence_index must ascend within 0..{num_sequences - 1}, got first {first}, "
                             f"last {last}, values {sequence_index[:8].tolist()}...")
