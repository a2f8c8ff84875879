"""`route` on a GPU: scores, top-k and weights of a tile of tokens in one kernel, the gradient in another.

The top-k takes the maximum k times. Score and index form one 64-bit key with the order of `route` (the larger
score first, NaN above all, then the lower index), so one integer maximum finds the next choice for any
layout. Sums over experts run over one token's row, sums over choices in order of k. Bytes moved per token: 8E
+ 12k forward, 8E + 12k to 12E + 12k backward.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.ahead_of_time import Compile
from kernels.triton_math import accurate_exp

TILE = 2048
LEAST_SUM = tl.constexpr(1e-20)
TAKEN = tl.constexpr(-(2**63))


@triton.jit
def ordered_keys(choice, e, E, BLOCK_E: tl.constexpr):
    """choice f32[BLOCK_T, BLOCK_E] -> i64 keys; the larger key is chosen first."""
    bits = choice.to(tl.int32, bitcast=True)
    key = tl.where(choice != choice, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))  # integers in the order of the floats
    return tl.where(e < E, (key.to(tl.int64) << 32) | (BLOCK_E - 1 - e), TAKEN)


@triton.jit(do_not_specialize=["T"])
def route_fwd_kernel(
    expert_ids,  # i64[T, K]
    weights,  # f32[T, K]
    scores,  # f32[T, E]
    logits,  # f32[T, E]
    bias,  # f32[E] with HAS_BIAS
    T, E, K: tl.constexpr, HAS_BIAS: tl.constexpr, SIGMOID: tl.constexpr,
    NORMALIZE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):
    # Scores.
    t = (tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]
    e, c = tl.arange(0, BLOCK_E)[None, :], tl.arange(0, BLOCK_K)[None, :]
    mask = (t < T) & (e < E)
    logit = tl.load(logits + t * E + e, mask=mask, other=float("-inf"))
    if SIGMOID:
        score = tl.div_rn(1.0, 1.0 + accurate_exp(tl.minimum(-logit, 80.0, propagate_nan=tl.PropagateNan.ALL)))
    else:
        raised = tl.where(e < E, accurate_exp(logit - tl.max(logit, axis=1)[:, None]), 0.0)
        score = tl.div_rn(raised, tl.sum(raised, axis=1)[:, None])
    tl.store(scores + t * E + e, score, mask=mask)
    # The top k, one choice at a time.
    key = ordered_keys(score + tl.load(bias + e, mask=e < E, other=0.0) if HAS_BIAS else score, e, E, BLOCK_E)
    chosen, weight = tl.zeros((BLOCK_T, BLOCK_K), tl.int32), tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    total = tl.zeros((BLOCK_T, 1), tl.float32)
    for choice in range(K):
        index = BLOCK_E - 1 - (tl.max(key, axis=1)[:, None] & 0xFFFFFFFF).to(tl.int32)
        is_taken = e == index
        key = tl.where(is_taken, TAKEN, key)
        value = tl.sum(tl.where(is_taken, score, 0.0), axis=1)[:, None]
        total += value
        chosen, weight = tl.where(c == choice, index, chosen), tl.where(c == choice, value, weight)
    # Weights.
    if NORMALIZE:
        weight = tl.div_rn(weight, tl.where(total < LEAST_SUM, LEAST_SUM, total) + tl.zeros_like(weight))
    tl.store(expert_ids + t * K + c, chosen.to(tl.int64), mask=(t < T) & (c < K))
    tl.store(weights + t * K + c, weight, mask=(t < T) & (c < K))


@triton.jit(do_not_specialize=["T"])
def route_bwd_kernel(
    dlogits,  # f32[T, E]
    dweights,  # f32[T, K] with HAS_DWEIGHTS
    dscores,  # f32[T, E] with HAS_DSCORES
    expert_ids,  # i64[T, K]
    scores,  # f32[T, E]
    T, E, K: tl.constexpr, HAS_DWEIGHTS: tl.constexpr, HAS_DSCORES: tl.constexpr,
    SIGMOID: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):
    """The gradient of the scores, from dscores and dweights, then through softmax or sigmoid."""
    t = (tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]
    e = tl.arange(0, BLOCK_E)[None, :]
    is_token = t < T
    mask = is_token & (e < E)
    score = tl.load(scores + t * E + e, mask=mask, other=0.0)
    gradient = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    if HAS_DSCORES:
        gradient = tl.load(dscores + t * E + e, mask=mask, other=0.0)
    # The gradient that reaches the chosen scores through the weights.
    if HAS_DWEIGHTS:
        divisor, mean = tl.full((BLOCK_T, 1), 1.0, tl.float32), tl.zeros((BLOCK_T, 1), tl.float32)
        if NORMALIZE:
            total, along = tl.zeros((BLOCK_T, 1), tl.float32), tl.zeros((BLOCK_T, 1), tl.float32)
            for choice in range(K):
                expert = tl.load(expert_ids + t * K + choice, mask=is_token, other=0)
                value = tl.load(scores + t * E + expert, mask=is_token, other=1.0)
                total += value
                along += tl.load(dweights + t * K + choice, mask=is_token, other=0.0) * value
            is_clamped = total < LEAST_SUM
            divisor = tl.where(is_clamped, LEAST_SUM, total)
            mean = tl.where(is_clamped, 0.0, along / divisor)  # the mean of dweights, weighted by the scores
        for choice in range(K):
            expert = tl.load(expert_ids + t * K + choice, mask=is_token, other=-1)
            upstream = tl.load(dweights + t * K + choice, mask=is_token, other=0.0)
            gradient += tl.where(e == expert, (upstream - mean) / divisor, 0.0)
    # Through softmax or sigmoid.
    along = 0.0 if SIGMOID else tl.sum(gradient * score, axis=1)[:, None]
    result = score * (gradient * (1.0 - score) if SIGMOID else gradient - along)
    tl.store(dlogits + t * E + e, result, mask=mask)


def config(num_experts: int) -> dict[str, int]:
    """The tile of a program, from the number of experts alone."""
    width = triton.next_power_of_2(num_experts)
    return {"BLOCK_T": max(1, TILE // width), "BLOCK_E": width, "num_warps": 4}


def moe_route_fwd(
    expert_ids: torch.Tensor, weights: torch.Tensor, scores: torch.Tensor, logits: torch.Tensor, bias: torch.Tensor | None,
    is_sigmoid: bool, normalize: bool,
) -> None:
    (num_tokens, num_experts), k = logits.shape, expert_ids.shape[1]
    if not num_tokens:
        return
    chosen = config(num_experts)
    route_fwd_kernel[(triton.cdiv(num_tokens, chosen["BLOCK_T"]),)](
        expert_ids, weights, scores, logits, logits if bias is None else bias, num_tokens, num_experts, K=k,
        HAS_BIAS=bias is not None, SIGMOID=is_sigmoid, NORMALIZE=normalize, BLOCK_K=triton.next_power_of_2(k), **chosen)


def moe_route_bwd(
    dlogits: torch.Tensor, dweights: torch.Tensor | None, dscores: torch.Tensor | None, expert_ids: torch.Tensor,
    scores: torch.Tensor, is_sigmoid: bool, normalize: bool,
) -> None:
    (num_tokens, num_experts), k = scores.shape, expert_ids.shape[1]
    if not num_tokens:
        return
    chosen = config(num_experts)
    route_bwd_kernel[(triton.cdiv(num_tokens, chosen["BLOCK_T"]),)](
        dlogits, scores if dweights is None else dweights, scores if dscores is None else dscores, expert_ids, scores, num_tokens,
        num_experts, K=k, HAS_DWEIGHTS=dweights is not None, HAS_DSCORES=dscores is not None, SIGMOID=is_sigmoid,
        NORMALIZE=normalize, **chosen)


def compiles() -> list[Compile]:
    found = []
    for num_experts, k, is_sigmoid in ((8, 2, False), (128, 8, False), (256, 8, True)):
        sizes = {"T": "i32", "E": "i32"}
        options = config(num_experts) | {"K": k, "SIGMOID": is_sigmoid, "NORMALIZE": True, "num_stages": 3}
        forward = dict.fromkeys(("weights", "scores", "logits", "bias"), "*fp32")
        backward = dict.fromkeys(("dlogits", "dweights", "dscores"), "*fp32")
        name = f"{'sigmoid' if is_sigmoid else 'softmax'} E{num_experts} k{k}"
        found += [
            Compile(f"moe_route_fwd {name}", torch.float32, route_fwd_kernel, {"expert_ids": "*i64"} | forward | sizes,
                    options | {"HAS_BIAS": is_sigmoid, "BLOCK_K": triton.next_power_of_2(k)}),
            Compile(f"moe_route_bwd {name}", torch.float32, route_bwd_kernel,
                    backward | {"expert_ids": "*i64", "scores": "*fp32"} | sizes,
                    options | {"HAS_DWEIGHTS": True, "HAS_DSCORES": is_sigmoid})]
    return found
