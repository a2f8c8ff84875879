"""`grpo_loss` on a GPU: loss, both gradients and all metrics of a block of tokens in one pass, for every
LossSpec with a built-in surrogate.

    sequence   if the spec needs it: each sequence's weight and mean log ratios, one program per sequence
    (main)     1024 tokens per program: dlogprobs, dentropy, and 14 partial metrics
    metrics    one program adds up the partial metrics, in f64 and in order

`token_loss` holds the formulas of a token, as in reference.py. Moved: 12 bytes per token in, 4 more if
sequences are read and for each optional input, 4 out for each gradient; partial metrics are 64 bytes per 1024
tokens. A sequence's sums start at its first token, so that their bits do not depend on its position in the
microbatch. No device sync: a sequence_index outside 0..S-1 is not used as an offset, and gives a NaN loss.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.ahead_of_time import Compile, pointer
from kernels.grpo_loss.function import METRICS
from kernels.grpo_loss.spec import CHOICES

MAX_LOG_RATIO = tl.constexpr(20.0)
CONFIG = {"BLOCK": 1024, "num_warps": 8}
"""Four tokens per thread: one 16-byte load of each input, and registers for 32 or more warps per SM."""
NUM_FLOATS = tl.constexpr(16)
"""Floats of a block's partial metrics: METRICS in order, and two unused."""
NUM_METRICS, NUM_SUMS = tl.constexpr(len(METRICS)), tl.constexpr(METRICS.index("ratio_max"))
APPROX_KL, W = tl.constexpr(METRICS.index("approx_kl_sum")), tl.constexpr(METRICS.index("w_sum"))
RATIO_MIN, GAP_MAX = tl.constexpr(METRICS.index("ratio_min")), tl.constexpr(METRICS.index("logprob_gap_max"))


@triton.jit
def capped(log_ratio):
    return tl.where(log_ratio > MAX_LOG_RATIO, MAX_LOG_RATIO, log_ratio)  # NaN stays


@triton.jit
def k3_of(d):
    """exp(d) - 1 - d without loss of digits: for |d| < 1 by its series up to d^10."""
    series = d * (1.0 / 3628800) + 1.0 / 362880
    series = series * d + 1.0 / 40320
    series = series * d + 1.0 / 5040
    series = series * d + 1.0 / 720
    series = series * d + 1.0 / 120
    series = series * d + 1.0 / 24
    series = series * d + 1.0 / 6
    series = series * d + 0.5
    return tl.where(tl.abs(d) < 1.0, d * d * series, tl.exp(d) - 1.0 - d)


@triton.jit
def token_loss(
    logprob, advantage, log_ratio, mismatch, ref, entropy,
    low, high, dual_clip, kl_coef, importance_low, importance_high, entropy_coef,
    SURROGATE: tl.constexpr, IMPORTANCE: tl.constexpr, ESTIMATOR: tl.constexpr,
):
    """The loss of tokens f32[BLOCK] before their weight, and its derivative in their logprobs.

    log_ratio, mismatch: logprob - old_logprob and old_logprob - rollout_logprob, at the spec's level. low,
    high: the clip range of the ratio. ref, entropy: None if not given; kl_coef and entropy_coef are 0 then.
    -> (loss, slope, ratio, k3 to the reference policy, and the tokens that the low, high and dual clip or
    importance change)
    """
    # The surrogate.
    ratio = tl.exp(capped(log_ratio))
    is_low, is_high = (ratio < low) & (advantage != 0.0), (ratio > high) & (advantage != 0.0)
    is_dual = is_low & False
    is_cut = is_dual
    clipped = tl.where(ratio < low, low, tl.where(ratio > high, high, ratio))
    if SURROGATE == "reinforce":
        is_low, is_high = is_dual, is_dual
        slope = -advantage
        loss = slope * logprob
    elif SURROGATE == "cispo":
        slope = -clipped * advantage
        loss = slope * logprob
    else:
        is_low, is_high = is_low & (advantage < 0.0), is_high & (advantage > 0.0)
        free, bound = ratio * advantage, clipped * advantage
        floor = dual_clip * advantage
        objective = tl.where(free > bound, bound, free)
        is_dual = (dual_clip != 0.0) & (advantage < 0.0) & (objective < floor)
        # A clipped token has no slope. NaN compares false and keeps its NaN slope.
        slope = tl.where((free > bound) | is_dual | (log_ratio > MAX_LOG_RATIO), 0.0, -free)
        loss = -tl.where(is_dual, floor, objective)
    # Times the importance weight, a constant.
    if IMPORTANCE != "none":
        w = tl.exp(capped(mismatch))
        is_cut = w > importance_high
        if IMPORTANCE == "tis":
            w = tl.where(is_cut, importance_high, w)
        else:
            is_cut = is_cut | (w < importance_low)
            w = tl.where(is_cut, 0.0, w)
        loss, slope = loss * w, slope * w
    # Plus the KL penalty, minus the entropy bonus.
    kl = tl.zeros_like(ratio)
    if ref is not None:
        d = ref - logprob
        near = capped(d)
        kl = k3_of(near)
        if ESTIMATOR == "k1":
            loss, slope = loss - kl_coef * d, slope + kl_coef
        elif ESTIMATOR == "k2":
            loss, slope = loss + kl_coef * (d * d * 0.5), slope - kl_coef * d
        elif ESTIMATOR == "k3":
            loss += kl_coef * kl
            slope -= kl_coef * tl.where(d > MAX_LOG_RATIO, 0.0, kl + near)  # exp(d) - 1
    if entropy is not None:
        loss -= entropy_coef * entropy
    return loss, slope, ratio, kl, is_low, is_high, is_dual, is_cut


@triton.jit
def lower_bound(ascending, N, value, WIDTH: tl.constexpr):
    """The first n with ascending[n] >= value, or N. With WIDTH = 1024 probes per round, three rounds search
    10^9 elements."""
    low, size = N * 0, N
    while size > 0:
        step = tl.cdiv(size, WIDTH)
        n = tl.arange(0, WIDTH) * step  # the first element of each of WIDTH parts
        is_below = tl.load(ascending + low + n, mask=n < size, other=value) < value
        num_below = tl.sum(is_below.to(tl.int64), 0)
        # The answer lies in the last part whose first element is below, after that element.
        last = tl.maximum(num_below - 1, 0) * step
        size = tl.where(num_below > 0, tl.minimum(step, size - last) - 1, 0)
        low += tl.where(num_below > 0, last + 1, 0)
    return low


@triton.jit(do_not_specialize=["N", "S"])
def grpo_loss_sequence_kernel(
    sequences,  # f32[3, S]: token weight; with BY_SEQUENCE mean log ratio, mean mismatch
    logprobs,  # f32[N]
    old_logprobs,  # f32[N]
    rollout_logprobs,  # f32[N] or None
    sequence_index,  # i32|i64[N]
    N, S, weight, total_sequences,
    BY_LENGTH: tl.constexpr, BY_SEQUENCE: tl.constexpr, BLOCK: tl.constexpr,
):
    """Fills `sequences`. BY_LENGTH: the token weight is 1 / (length * total_sequences), else `weight`."""
    # The sequence's tokens, begin..end - 1.
    s = tl.program_id(0).to(tl.int64)
    N, S = N.to(tl.int64), S.to(tl.int64)
    begin = lower_bound(sequence_index, N, s, BLOCK)
    end = lower_bound(sequence_index, N, s + 1, BLOCK)
    length = tl.maximum(end - begin, 1).to(tl.float32)
    if BY_LENGTH:
        weight = tl.div_rn(1.0, length * total_sequences)
    tl.store(sequences + s, weight)
    # The means over its tokens.
    if BY_SEQUENCE:
        log_ratio, mismatch = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
        for first in range(begin, end, BLOCK):
            n = first + tl.arange(0, BLOCK)
            old = tl.load(old_logprobs + n, mask=n < end, other=0.0)
            log_ratio += tl.load(logprobs + n, mask=n < end, other=0.0) - old
            if rollout_logprobs is not None:
                mismatch += old - tl.load(rollout_logprobs + n, mask=n < end, other=0.0)
        tl.store(sequences + S + s, tl.div_rn(tl.sum(log_ratio, 0), length))
        if rollout_logprobs is not None:
            tl.store(sequences + 2 * S + s, tl.div_rn(tl.sum(mismatch, 0), length))


@triton.jit(do_not_specialize=["N", "S"])
def grpo_loss_kernel(
    dlogprobs,  # f32[N]
    dentropy,  # f32[N], or [0] without an entropy bonus
    partials,  # f32[num_blocks, NUM_FLOATS]
    logprobs,  # f32[N]
    old_logprobs,  # f32[N]
    advantages,  # f32[N]
    sequence_index,  # i32|i64[N]
    rollout_logprobs,  # f32[N] or None
    ref_logprobs,  # f32[N] or None
    entropies,  # f32[N] or None
    sequences,  # f32[3, S] of grpo_loss_sequence_kernel, or None
    N, S, weight, low, high, dual_clip, kl_coef, importance_low, importance_high, entropy_coef,
    SURROGATE: tl.constexpr, IMPORTANCE: tl.constexpr, ESTIMATOR: tl.constexpr, BY_SEQUENCE: tl.constexpr, BLOCK: tl.constexpr,
):
    """`sequences` is None if the spec does not need it; the weight of every token is then `weight`."""
    # The inputs of a block of tokens.
    N, S = N.to(tl.int64), S.to(tl.int64)
    block = tl.program_id(0).to(tl.int64)
    n = block * BLOCK + tl.arange(0, BLOCK)
    is_there = n < N
    logprob = tl.load(logprobs + n, mask=is_there, other=0.0)
    old = tl.load(old_logprobs + n, mask=is_there, other=0.0)
    advantage = tl.load(advantages + n, mask=is_there, other=0.0)
    token_log_ratio = logprob - old
    log_ratio, mismatch, gap, ref, entropy = token_log_ratio, token_log_ratio, token_log_ratio, None, None
    measured_entropy = tl.zeros_like(logprob)
    if rollout_logprobs is not None:
        rollout = tl.load(rollout_logprobs + n, mask=is_there, other=0.0)
        gap, mismatch = logprob - rollout, old - rollout
    if ref_logprobs is not None:
        ref = tl.load(ref_logprobs + n, mask=is_there, other=0.0)
    if entropies is not None:
        entropy = tl.load(entropies + n, mask=is_there, other=0.0)
        measured_entropy = entropy
    # Weights and ratios that belong to the sequence.
    if sequences is not None:
        s = tl.load(sequence_index + n, mask=is_there, other=-1).to(tl.int64)
        is_known = (s >= 0) & (s < S)
        weight = tl.load(sequences + s, mask=is_known, other=float("nan"))
        if BY_SEQUENCE:
            log_ratio = tl.load(sequences + S + s, mask=is_known, other=float("nan"))
            if IMPORTANCE != "none":
                mismatch = tl.load(sequences + 2 * S + s, mask=is_known, other=float("nan"))
    # The loss of each token and its gradients.
    loss, slope, ratio, kl, is_low, is_high, is_dual, is_cut = token_loss(
        logprob, advantage, log_ratio, mismatch, ref, entropy, low, high, dual_clip, kl_coef, importance_low, importance_high,
        entropy_coef, SURROGATE, IMPORTANCE, ESTIMATOR)
    tl.store(dlogprobs + n, slope * weight, mask=is_there)
    tl.store(dentropy + n, tl.zeros_like(logprob) - entropy_coef * weight, mask=is_there & (entropy_coef != 0.0))

    # The block's metrics.
    w = tl.exp(capped(gap))  # the current policy over the policy that sampled
    sums = (loss * weight, is_low, is_high, is_dual, is_cut, is_there, k3_of(capped(token_log_ratio)), w, w * w, kl,
            measured_entropy)
    extremes = (ratio, -ratio, tl.abs(gap))
    row = partials + block * NUM_FLOATS
    for i in tl.static_range(NUM_SUMS):
        tl.store(row + i, tl.sum(tl.where(is_there, sums[i].to(tl.float32), 0.0), 0))
    for i in tl.static_range(NUM_METRICS - NUM_SUMS):
        tl.store(row + NUM_SUMS + i, tl.max(tl.where(is_there, extremes[i], float("-inf")), 0))


@triton.jit(do_not_specialize=["num_blocks"])
def grpo_loss_metrics_kernel(
    loss,  # f32[]
    metrics,  # f32[NUM_METRICS]
    partials,  # f32[num_blocks, NUM_FLOATS]
    num_blocks, BLOCK: tl.constexpr,
):
    """Merges the blocks' partial metrics in order."""
    metric = tl.arange(0, NUM_FLOATS)
    sums = tl.zeros((BLOCK, NUM_FLOATS), tl.float64)
    most = tl.full((BLOCK, NUM_FLOATS), float("-inf"), tl.float32)
    for first in range(0, num_blocks, BLOCK):
        block = first + tl.arange(0, BLOCK).to(tl.int64)
        is_there = (block[:, None] < num_blocks) & (metric[None, :] < NUM_METRICS)
        part = tl.load(partials + block[:, None] * NUM_FLOATS + metric[None, :], mask=is_there, other=float("-inf"))
        most = tl.maximum(most, part)
        sums += tl.where(is_there, part, 0.0).to(tl.float64)
    total, extreme = tl.sum(sums, 0), tl.max(most, 0)
    value = tl.where(metric == RATIO_MIN, -extreme, extreme)
    # tl.max drops a NaN; the sums keep it, and give it back to the extremes.
    approx_kl, w = tl.sum(tl.where(metric == APPROX_KL, total, 0.0), 0), tl.sum(tl.where(metric == W, total, 0.0), 0)
    kept = tl.where(metric == GAP_MAX, w, approx_kl)
    value = tl.where(kept != kept, float("nan"), value)
    value = tl.where(metric < NUM_SUMS, total.to(tl.float32), value)
    tl.store(metrics + metric, value, mask=metric < NUM_METRICS)
    tl.store(loss + metric, value, mask=metric == 0)


def grpo_loss(
    loss: torch.Tensor, metrics: torch.Tensor, dlogprobs: torch.Tensor, dentropy: torch.Tensor, logprobs: torch.Tensor,
    old_logprobs: torch.Tensor, advantages: torch.Tensor, sequence_index: torch.Tensor, rollout_logprobs: torch.Tensor | None,
    ref_logprobs: torch.Tensor | None, entropy: torch.Tensor | None, choices: list[int], counts: list[int], numbers: list[float],
) -> None:
    # The spec, and the weight of a token unless its sequence decides it.
    ratio, surrogate, estimator, importance, normalizer = (
        allowed[i] for i, allowed in zip(choices, CHOICES.values(), strict=True))
    num_sequences, total_tokens, total_sequences, constant_length = counts
    clip_low, clip_high, dual_clip, kl_coef, importance_low, importance_high, entropy_coef = numbers
    denominator = {"token": total_tokens, "constant": total_sequences * constant_length, "sequence": 1}[normalizer]
    weight, by_sequence, num_tokens = 1 / max(denominator, 1), ratio == "sequence", logprobs.shape[0]
    # At most three launches; without tokens the metrics alone.
    num_blocks = triton.cdiv(num_tokens, CONFIG["BLOCK"])
    partials = logprobs.new_empty(num_blocks, NUM_FLOATS.value)
    sequences: torch.Tensor | None = None
    if num_tokens:
        if by_sequence or normalizer == "sequence":
            sequences = logprobs.new_empty(3, num_sequences)
            grpo_loss_sequence_kernel[(num_sequences,)](
                sequences, logprobs, old_logprobs, rollout_logprobs, sequence_index, num_tokens, num_sequences, weight,
                float(total_sequences), BY_LENGTH=normalizer == "sequence", BY_SEQUENCE=by_sequence, **CONFIG)
        grpo_loss_kernel[(num_blocks,)](
            dlogprobs, dentropy, partials, logprobs, old_logprobs, advantages, sequence_index, rollout_logprobs, ref_logprobs,
            entropy, sequences, num_tokens, num_sequences, weight, 1 - clip_low, 1 + clip_high, dual_clip, kl_coef, importance_low,
            importance_high, entropy_coef, SURROGATE=surrogate, IMPORTANCE=importance, ESTIMATOR=estimator, BY_SEQUENCE=by_sequence,
            **CONFIG)
    grpo_loss_metrics_kernel[(1,)](loss, metrics, partials, num_blocks, BLOCK=64, num_warps=4)


def compiles() -> list[Compile]:
    """The lightest and the heaviest specialisation of the main kernel, and the kernels before and after
    it."""
    f32, i32 = torch.float32, "*i32"
    given, scalars = pointer(f32), ("low", "high", "dual_clip", "kl_coef", "importance_low", "importance_high", "entropy_coef")
    columns = ("dlogprobs", "dentropy", "partials", "logprobs", "old_logprobs", "advantages")
    found = []
    for name, optional, by_sequence, options in (
        ("grpo_loss", None, False, {"SURROGATE": "clip", "IMPORTANCE": "none", "ESTIMATOR": "k3"}),
        ("grpo_loss sequence kl tis", given, True, {"SURROGATE": "clip", "IMPORTANCE": "tis", "ESTIMATOR": "k3"}),
    ):
        arguments = dict.fromkeys(columns, given) | {"sequence_index": i32} | dict.fromkeys(
            ("rollout_logprobs", "ref_logprobs", "entropies", "sequences"), optional)
        arguments |= {"N": "i32", "S": "i32", "weight": "fp32"} | dict.fromkeys(scalars, "fp32")
        found.append(Compile(name, f32, grpo_loss_kernel, arguments, options | CONFIG | {"BY_SEQUENCE": by_sequence}))
    arguments = dict.fromkeys(("sequences", "logprobs", "old_logprobs", "rollout_logprobs"), given) | {"sequence_index": i32}
    arguments |= {"N": "i32", "S": "i32", "weight": "fp32", "total_sequences": "fp32"}
    found.append(Compile("grpo_loss_sequence", f32, grpo_loss_sequence_kernel, arguments,
                         CONFIG | {"BY_LENGTH": True, "BY_SEQUENCE": True}))
    found.append(Compile("grpo_loss_metrics", f32, grpo_loss_metrics_kernel,
                         {"loss": given, "metrics": given, "partials": given, "num_blocks": "i32"}, {"BLOCK": 64, "num_warps": 4}))
    return found
