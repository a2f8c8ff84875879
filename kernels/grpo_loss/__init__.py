"""grpo_loss: from token logprobs to the scalar that is backpropagated (step 7), for the whole GRPO family.

Files here: `spec.py` (the choices), `inputs.py` (the constants), `surrogates.py` (one function each; yours
too), `reference.py` (the specification), `metrics.py` (merging and finishing the metrics), `function.py`
(autograd over the kernels in `triton_kernel.py` and `csrc/grpo_loss/`). Tests:
`tests/kernels/test_grpo_loss.py`; `tests/reason_rl/rl/test_algorithms.py` compares each algorithm with its
paper. Left out: logprobs and entropy from hidden states (`kernels/linear_logprob`), advantages
(`kernels/group_advantage`).
"""

from __future__ import annotations

import torch

from kernels import triton_ops
from kernels.checks import check
from kernels.dispatch import Implementation, Op
from kernels.grpo_loss.function import grpo_loss_by
from kernels.grpo_loss.inputs import LossInputs
from kernels.grpo_loss.metrics import finish_metrics, merge_metrics
from kernels.grpo_loss.reference import grpo_loss_reference, make_inputs
from kernels.grpo_loss.spec import CHOICES, LossSpec
from kernels.grpo_loss.surrogates import SURROGATES
from kernels.native import OPS, cpu_unsupported_reason

__all__ = ["OP", "SURROGATES", "LossInputs", "LossSpec", "finish_metrics", "grpo_loss", "make_inputs", "merge_metrics"]

triton_ops.register("grpo_loss", {
    "grpo_loss": "(Tensor(a!) loss, Tensor(b!) metrics, Tensor(c!) dlogprobs, Tensor(d!) dentropy, Tensor logprobs, "
                 "Tensor old_logprobs, Tensor advantages, Tensor sequence_index, Tensor? rollout_logprobs, Tensor? ref_logprobs, "
                 "Tensor? entropy, int[] choices, int[] counts, float[] numbers) -> ()"})
F32 = (torch.float32,)
OP = Op("grpo_loss", (
    Implementation("native", grpo_loss_by(OPS), cpu_unsupported_reason, F32, CHOICES["surrogate"]),
    Implementation("triton", grpo_loss_by(triton_ops.OPS), triton_ops.unsupported_reason, F32, CHOICES["surrogate"]),
    Implementation("reference", grpo_loss_reference)))


def grpo_loss(
    logprobs: torch.Tensor, inputs: LossInputs, spec: LossSpec, entropy: torch.Tensor | None = None, impl: str = "auto"
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """This microbatch's part of the policy loss: the parts of all microbatches and ranks add up to the
    batch's loss.

        loss = sum_n weight[n] * (importance[n] * surrogate[n] + kl_coef * kl[n] - entropy_coef * entropy[n])

    with, for token n of a sequence (a completion) of len tokens, ratio = exp(logprob - old_logprob), or under
    ratio="sequence" exp(mean of logprob - old_logprob over the sequence), and
    clip(x) = min(max(x, 1 - clip_low), 1 + clip_high):

        surrogate   clip        -min(ratio A, clip(ratio) A); with dual_clip c, where A < 0: at most -c A
                                PPO arXiv:1707.06347 eq. 7, GRPO arXiv:2402.03300 eq. 3,
                                DAPO arXiv:2503.14476 eq. 8, GSPO arXiv:2507.18071 eq. 5 and 7,
                                dual clip arXiv:1912.09729; the two-sided clip of arXiv:2505.07291 is dual
                                clip with c = its delta, above 1 + clip_high
                    cispo       -stop_gradient(clip(ratio)) A logprob     MiniMax-M1 arXiv:2506.13585 eq. 4, 5
                    reinforce   -A logprob                                RLOO arXiv:2402.14740
        kl          k1 -d, k2 d^2 / 2, k3 exp(d) - 1 - d, with d = ref_logprob - logprob (Schulman 2020): a
                    plain loss term. Its gradient is the estimator's (k1's, on policy, has expectation 0)
        importance  w = exp(old_logprob - rollout_logprob), at the ratio's level (token or sequence), constant:
                    tis min(w, importance_high); icepop w inside [importance_low, importance_high], 0 outside
        weight      token 1 / total_loss_tokens; sequence 1 / (len * total_sequences);
                    constant 1 / (total_sequences * constant_length)

    Importance multiplies the surrogate alone; a token that it masks still counts in the denominator. Under
    ratio="sequence" the advantage must be the same at all tokens of a sequence, and the gradient is GSPO's
    eq. 10: each token gets ratio * A / len of its sequence's term. dual_clip affects "clip" alone, clip_low
    and clip_high affect "clip" and "cispo".

    Arguments: logprobs f32[N] in nats, inputs (see `LossInputs`), entropy f32[N] in nats. All may be f64.
    Returns: loss f32[], and detached metrics, f32[] each, for `merge_metrics` and `finish_metrics`.
    Raises ValueError on shapes, dtypes, and inputs that `spec` needs and that are None.
    Differentiable in logprobs and entropy. Computed in the dtype of logprobs. exp() takes log ratios above 20
    as 20 (with gradient 0), so that a broken token shows in the metrics, not as NaN in the weights.
    Saved for backward: dloss/dlogprob f32[N], computed in the forward pass, and dloss/dentropy f32[N] if
    entropy_coef is set. The reference saves several tensors of [N].
    Moved: 16 N bytes in, 4 N more for each optional input, 4 N out for dlogprobs.
    A surrogate that no kernel implements runs on the reference under impl="auto"; one line is logged.
    """
    check_inputs(logprobs, inputs, spec, entropy)
    loss, metrics = OP.choose(logprobs, impl, spec.surrogate).run(logprobs, inputs, spec, entropy)
    return loss, metrics


def check_inputs(logprobs: torch.Tensor, inputs: LossInputs, spec: LossSpec, entropy: torch.Tensor | None) -> None:
    """Raises grpo_loss's errors. linear_grpo_loss calls it too, with placeholders for logprobs and
    entropy."""
    check("grpo_loss", "logprobs", logprobs, ("N",), (torch.float32, torch.float64))
    shape = tuple(logprobs.shape)
    given = {"old_logprobs": inputs.old_logprobs, "advantages": inputs.advantages}
    optional = {"rollout_logprobs": inputs.rollout_logprobs, "ref_logprobs": inputs.ref_logprobs, "entropy": entropy}
    for name, tensor in (given | {name: x for name, x in optional.items() if x is not None}).items():
        check("grpo_loss", name, tensor, shape, logprobs.dtype, like=logprobs)
    check("grpo_loss", "sequence_index", inputs.sequence_index, shape, (torch.int32, torch.int64), like=logprobs)
    _check_needs(spec, optional)
    _check_counts(inputs)


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


def _check_counts(inputs: LossInputs) -> None:
    index, num_sequences = inputs.sequence_index, inputs.num_sequences
    num_loss_tokens = index.numel()
    if inputs.total_loss_tokens < num_loss_tokens:
        raise ValueError(f"grpo_loss: total_loss_tokens must count all microbatches, so at least the {num_loss_tokens} "
                         f"tokens of this one, got {inputs.total_loss_tokens}")
    if inputs.total_sequences < num_sequences:
        raise ValueError(f"grpo_loss: total_sequences must count all microbatches, so at least the {num_sequences} "
                         f"sequences of this one, got {inputs.total_sequences}")
    if num_loss_tokens and num_sequences < 1:
        raise ValueError(f"grpo_loss: num_sequences must be >= 1 for {num_loss_tokens} tokens, got {num_sequences}")
    if index.is_cpu and num_loss_tokens:
        first, last = int(index[0]), int(index[-1])
        if first < 0 or last >= num_sequences or bool((index.diff() < 0).any()):
            raise ValueError(f"grpo_loss: sequence_index must ascend within 0..{num_sequences - 1}, got first {first}, "
                             f"last {last}, values {index[:8].tolist()}...")
