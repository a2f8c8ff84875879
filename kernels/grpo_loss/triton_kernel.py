"""`grpo_loss` on a GPU: loss, both gradients and all metrics of a block of tokens in one pass, whatever the
LossSpec.

    sequence   where a spec reads sequences: each one's weight and mean log ratios, one program a sequence
    (main)     1024 tokens a program: dlogprobs, dentropy, and 14 partial metrics
    metrics    one program adds the partials up, in f64 and in order

A token's formulas stand once, in `token_loss`, as reference.py has them. Moved: 12 bytes a token in, 4 more
where sequences are read and for each optional input, 4 out for each gradient; the partials are 64 bytes for
1024 tokens. A sequence's sums start at its first token, so that its bits do not depend on where in the
microbatch it stands. Nothing waits for the device: a sequence_index out of 0..S-1 is never followed, it gives
a NaN loss.
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
"""Four tokens a thread: one 16-byte load for each input, and registers for 32 warps and more on an SM."""
ROW = tl.constexpr(16)
"""Floats of a block's partials: METRICS in their order, and two not used."""
NUM_METRICS, NUM_SUMS = tl.constexpr(len(METRICS)), tl.constexpr(METRICS.index("ratio_max"))
APPROX_KL, W = tl.constexpr(METRICS.index("approx_kl_sum")), tl.constexpr(METRICS.index("w_sum"))
RATIO_MIN, GAP_MAX = tl.constexpr(METRICS.index("ratio_min")), tl.constexpr(METRICS.index("logprob_gap_max"))


@triton.jit
def capped(log_ratio):
    return tl.where(log_ratio > MAX_LOG_RATIO, MAX_LOG_RATIO, log_ratio)  # NaN stays


@triton.jit
def k3_of(d):
    """exp(d) - 1 - d without loss of digits: its series up to d^10 below 1."""
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
    """The loss of tokens f32[BLOCK] before their weight, and its slope in their logprobs.

    log_ratio, mismatch: logprob - old_logprob and old_logprob - rollout_logprob, at the spec's level; low,
    high: the ratio's bounds; ref, entropy: None where not given, kl_coef and entropy_coef then 0. -> (loss,
    slope, ratio, kl to the reference, and where the clips bind and importance cut: low, high, dual, cut)
    """
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
        # What is cut has no slope; NaN compares false and keeps its own.
        slope = tl.where((free > bound) | is_dual | (log_ratio > MAX_LOG_RATIO), 0.0, -free)
        loss = -tl.where(is_dual, floor, objective)
    if IMPORTANCE != "none":
        w = tl.exp(capped(mismatch))
        is_cut = w > importance_high
        if IMPORTANCE == "tis":
            w = tl.where(is_cut, importance_high, w)
        else:
            is_cut = is_cut | (w < importance_low)
            w = tl.where(is_cut, 0.0, w)
        loss, slope = loss * w, slope * w
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
    """The first n with ascending[n] >= value, or N: WIDTH probes at a time, so three rounds for a thousand
    million."""
    low, size = N * 0, N
    while size > 0:
        step = tl.cdiv(size, WIDTH)
        n = tl.arange(0, WIDTH) * step  # the first of each of WIDTH parts
        is_below = tl.load(ascending + low + n, mask=n < size, other=value) < value
        num_below = tl.sum(is_below.to(tl.int64), 0)
        # In the last part whose first is below, behind that first one.
        last = tl.maximum(num_below - 1, 0) * step
        size = tl.where(num_below > 0, tl.minimum(step, size - last) - 1, 0)
        low += tl.where(num_below > 0, last + 1, 0)
    return low


@triton.jit(do_not_specialize=["N", "S"])
def grpo_loss_sequence_kernel(
    sequences, logprobs, old_logprobs, rollout_logprobs, sequence_index, N, S, weight, total_sequences,
    BY_LENGTH: tl.constexpr, BY_SEQUENCE: tl.constexpr, BLOCK: tl.constexpr,
):
    """sequences f32[3, S]: weight of each of its tokens; with BY_SEQUENCE mean log ratio, and mean mismatch
    where there is one."""
    s = tl.program_id(0).to(tl.int64)
    N, S = N.to(tl.int64), S.to(tl.int64)
    begin = lower_bound(sequence_index, N, s, BLOCK)
    end = lower_bound(sequence_index, N, s + 1, BLOCK)
    length = tl.maximum(end - begin, 1).to(tl.float32)
    if BY_LENGTH:
        weight = tl.div_rn(1.0, length * total_sequences)
    tl.store(sequences + s, weight)
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
    dlogprobs, dentropy, partials, logprobs, old_logprobs, advantages, sequence_index, rollout_logprobs, ref_logprobs, entropies,
    sequences, N, S, weight, low, high, dual_clip, kl_coef, importance_low, importance_high, entropy_coef,
    SURROGATE: tl.constexpr, IMPORTANCE: tl.constexpr, ESTIMATOR: tl.constexpr, BY_SEQUENCE: tl.constexpr, BLOCK: tl.constexpr,
):
    """Optional inputs are None where not given, `sequences` where no choice reads it; `weight` counts where
    it does not."""
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
    if sequences is not None:
        s = tl.load(sequence_index + n, mask=is_there, other=-1).to(tl.int64)
        is_known = (s >= 0) & (s < S)
        weight = tl.load(sequences + s, mask=is_known, other=float("nan"))
        if BY_SEQUENCE:
            log_ratio = tl.load(sequences + S + s, mask=is_known, other=float("nan"))
            if IMPORTANCE != "none":
                mismatch = tl.load(sequences + 2 * S + s, mask=is_known, other=float("nan"))
    loss, slope, ratio, kl, is_low, is_high, is_dual, is_cut = token_loss(
        logprob, advantage, log_ratio, mismatch, ref, entropy, low, high, dual_clip, kl_coef, importance_low, importance_high,
        entropy_coef, SURROGATE, IMPORTANCE, ESTIMATOR)
    tl.store(dlogprobs + n, slope * weight, mask=is_there)
    tl.store(dentropy + n, tl.zeros_like(logprob) - entropy_coef * weight, mask=is_there & (entropy_coef != 0.0))

    w = tl.exp(capped(gap))  # the current policy over the one that sampled
    sums = (loss * weight, is_low, is_high, is_dual, is_cut, is_there, k3_of(capped(token_log_ratio)), w, w * w, kl,
            measured_entropy)
    extremes = (ratio, -ratio, tl.abs(gap))
    row = partials + block * ROW
    for i in tl.static_range(NUM_SUMS):
        tl.store(row + i, tl.sum(tl.where(is_there, sums[i].to(tl.float32), 0.0), 0))
    for i in tl.static_range(NUM_METRICS - NUM_SUMS):
        tl.store(row + NUM_SUMS + i, tl.max(tl.where(is_there, extremes[i], float("-inf")), 0))


@triton.jit(do_not_specialize=["num_blocks"])
def grpo_loss_metrics_kernel(loss, metrics, partials, num_blocks, BLOCK: tl.constexpr):
    """partials f32[num_blocks, ROW] -> loss f32[] and metrics f32[NUM_METRICS]."""
    metric = tl.arange(0, ROW)
    sums = tl.zeros((BLOCK, ROW), tl.float64)
    most = tl.full((BLOCK, ROW), float("-inf"), tl.float32)
    for first in range(0, num_blocks, BLOCK):
        block = first + tl.arange(0, BLOCK).to(tl.int64)
        is_there = (block[:, None] < num_blocks) & (metric[None, :] < NUM_METRICS)
        part = tl.load(partials + block[:, None] * ROW + metric[None, :], mask=is_there, other=float("-inf"))
        most = tl.maximum(most, part)
        sums += tl.where(is_there, part, 0.0).to(tl.float64)
    total, extreme = tl.sum(sums, 0), tl.max(most, 0)
    value = tl.where(metric == RATIO_MIN, -extreme, extreme)
    # The extremes drop a NaN that the sums keep.
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
    ratio, surrogate, estimator, importance, normalizer = (
        allowed[i] for i, allowed in zip(choices, CHOICES.values(), strict=True))
    num_sequences, total_tokens, total_sequences, constant_length = counts
    clip_low, clip_high, dual_clip, kl_coef, importance_low, importance_high, entropy_coef = numbers
    shares = {"token": total_tokens, "constant": total_sequences * constant_length, "sequence": 1}[normalizer]
    weight, by_sequence, num_tokens = 1 / max(shares, 1), ratio == "sequence", logprobs.shape[0]
    num_blocks = triton.cdiv(num_tokens, CONFIG["BLOCK"])
    partials = logprobs.new_empty(num_blocks, ROW.value)
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
    """The lightest form of the main kernel and the heaviest, and what stands before and after it."""
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
