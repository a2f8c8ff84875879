"""Mixture of experts: `route` picks k experts per token, `experts` runs and combines them, `load_balance` and
`z_loss` regularise the router.

    scores  = softmax(logits) or sigmoid(logits)                     f32[T, E]
    chosen  = top-k of scores + expert_bias, ties by index           (the bias affects the choice alone,
                                                                      arXiv:2408.15664)
    weights = scores[chosen], divided by their sum if normalize      f32[T, k]
    out[t]  = sum_c weights[t, c] * down_e(swiglu(gate_up_e(x[t]))), e = chosen[t, c], c = 0..k-1 in order
    load_balance = E * sum_e (fraction of routed tokens)_e * (mean score)_e    (Switch, arXiv:2101.03961 eq. 4)
    z_loss = mean over tokens of logsumexp(logits)^2                           (ST-MoE, arXiv:2202.08906 eq. 5)

Gradients reach the router through `weights` and the mean score; the choice has none. Router logits and the
combine are f32. Expert GEMMs are in x's dtype and batch-invariant like `linear`, so a token's bits do not
depend on the other tokens of its expert. Expert weights have x's dtype, or are f32 masters that are rounded
to it at each use; their gradients are summed in f32. impl="torch" runs the experts by torch's own GEMMs:
fast, and not batch-invariant.

Saved for backward: x, expert_ids, weights, the gate_up outputs (the reference saves the swiglu and down
outputs too).
Flops: 6TkDI forward, 12TkDI backward.
On a GPU there is no device sync: expert_ids outside 0..E-1, which raise on the CPU, make their tokens NaN.
Siblings: reference.py, function.py, triton_kernel.py (experts), triton_route.py and triton_plan.py (the sort)
here, csrc/moe/, tests/kernels/test_moe.py.
"""

from __future__ import annotations

import torch

from kernels import triton_ops
from kernels.checks import FLOATS, check
from kernels.dispatch import Implementation, Op
from kernels.moe.function import experts_by, route_by
from kernels.moe.reference import (
    Route,
    expert_counts,
    experts_reference,
    experts_torch,
    load_balance_reference,
    make_inputs,
    route_reference,
    z_loss_reference,
)
from kernels.native import DTYPES, OPS, cpu_unsupported_reason

__all__ = ["Route", "expert_counts", "experts", "load_balance", "make_inputs", "route", "z_loss"]

triton_ops.register("moe", {
    "moe_route_fwd": "(Tensor(a!) expert_ids, Tensor(b!) weights, Tensor(c!) scores, Tensor logits, Tensor? bias, bool sigmoid, "
                     "bool normalize) -> ()",
    "moe_route_bwd": "(Tensor(a!) dlogits, Tensor? dweights, Tensor? dscores, Tensor expert_ids, Tensor scores, bool sigmoid, "
                     "bool normalize) -> ()",
    "moe_experts_fwd": "(Tensor(a!) y, Tensor(b!) kept, Tensor x, Tensor gate_up, Tensor down, Tensor expert_ids, Tensor weights) "
                       "-> ()",
    "moe_experts_bwd": "(Tensor(a!) dx, Tensor(b!) dgate_up, Tensor(c!) ddown, Tensor(d!) dweights, Tensor dy, Tensor kept, "
                       "Tensor x, Tensor gate_up, Tensor down, Tensor expert_ids, Tensor weights) -> ()"})
ROUTE_OP = Op("moe_route", (
    Implementation("native", route_by(OPS), cpu_unsupported_reason, DTYPES),
    Implementation("triton", route_by(triton_ops.OPS), triton_ops.unsupported_reason, (torch.float32,)),
    Implementation("reference", route_reference)))
EXPERTS_OP = Op("moe_experts", (
    Implementation("native", experts_by(OPS), cpu_unsupported_reason, DTYPES),
    Implementation("triton", experts_by(triton_ops.OPS, sums_stay_f32=False), triton_ops.unsupported_reason, triton_ops.DTYPES),
    Implementation("reference", experts_reference),
    Implementation("torch", experts_torch, is_automatic=False)))
WIDE = (torch.float32, torch.float64)


def route(
    router_logits: torch.Tensor, num_experts_per_tok: int, *, score: str = "softmax", normalize: bool = True,
    expert_bias: torch.Tensor | None = None, impl: str = "auto",
) -> Route:
    """router_logits: f32[T, E], expert_bias: f32[E] -> Route(expert_ids i64[T, k], weights f32[T, k], scores
    f32[T, E])."""
    check("route", "router_logits", router_logits, ("T", "E"), WIDE)
    num_experts = router_logits.shape[1]
    if not 1 <= num_experts_per_tok <= num_experts:
        raise ValueError(f"route: num_experts_per_tok must be in 1..{num_experts}, got {num_experts_per_tok}")
    if score not in ("softmax", "sigmoid"):
        raise ValueError(f"route: score must be 'softmax' or 'sigmoid', got {score!r}")
    if expert_bias is not None:
        check("route", "expert_bias", expert_bias, (num_experts,), WIDE, like=router_logits)
    result: Route = ROUTE_OP.choose(router_logits, impl).run(
        router_logits, num_experts_per_tok, score, normalize, expert_bias)
    return result


def load_balance(scores: torch.Tensor, expert_ids: torch.Tensor) -> torch.Tensor:
    """scores: f32[T, E], expert_ids: i64[T, k] -> f32[]: 1 if the load is even, up to E if one expert gets
    all tokens."""
    check("load_balance", "scores", scores, ("T", "E"), WIDE)
    check("load_balance", "expert_ids", expert_ids, (scores.shape[0], "k"), torch.int64, like=scores)
    return load_balance_reference(scores, expert_ids)


def z_loss(router_logits: torch.Tensor) -> torch.Tensor:
    """router_logits: f32[T, E] -> f32[]; keeps the logits small."""
    check("z_loss", "router_logits", router_logits, ("T", "E"), WIDE)
    return z_loss_reference(router_logits)


def experts(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor, impl: str = "auto"
) -> torch.Tensor:
    """x: float[T, D], gate_up [E, 2I, D] and down [E, D, I] of the same dtype or f32, expert_ids: i64[T, k],
    weights: f32[T, k] -> float[T, D]."""
    check("experts", "x", x, ("T", "D"), FLOATS)
    check("experts", "gate_up", gate_up, ("E", "2I", x.shape[1]), (x.dtype, torch.float32), like=x)
    check("experts", "down", down, (gate_up.shape[0], x.shape[1], gate_up.shape[1] // 2), (x.dtype, torch.float32), like=x)
    check("experts", "expert_ids", expert_ids, (x.shape[0], "k"), torch.int64, like=x)
    check("experts", "weights", weights, tuple(expert_ids.shape), WIDE, like=x)
    result: torch.Tensor = EXPERTS_OP.choose(x, impl).run(x, gate_up, down, expert_ids, weights)
    return result
