"""`route` and `experts` as autograd.Functions over ops that write their results:
torch.ops.*.moe_{route,experts}_{fwd,bwd}."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from kernels.moe.reference import Route


def route_by(ops: Any) -> Callable[[torch.Tensor, int, str, bool, torch.Tensor | None], Route]:
    """The op by `ops`, which has moe_route_fwd and moe_route_bwd: torch.ops.reason_rl or
    torch.ops.reason_rl_triton."""

    class RouteFunction(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any, logits: torch.Tensor, k: int, is_sigmoid: bool, normalize: bool, expert_bias: torch.Tensor | None
        ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            logits = logits.contiguous()
            num_tokens = logits.shape[0]
            expert_ids = torch.empty(num_tokens, k, dtype=torch.int64, device=logits.device)
            weights, scores = logits.new_empty(num_tokens, k), torch.empty_like(logits)
            bias = None if expert_bias is None else expert_bias.detach().to(logits.dtype).contiguous()
            ops.moe_route_fwd(expert_ids, weights, scores, logits, bias, is_sigmoid, normalize)
            ctx.mark_non_differentiable(expert_ids)
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(expert_ids, scores)
            ctx.options = (is_sigmoid, normalize)
            return expert_ids, weights, scores

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
            expert_ids, scores = ctx.saved_tensors
            _, dweights, dscores = (None if grad is None else grad.contiguous() for grad in grads)
            dlogits = torch.empty_like(scores)
            ops.moe_route_bwd(dlogits, dweights, dscores, expert_ids, scores, *ctx.options)
            return dlogits, None, None, None, None

    def route(
        router_logits: torch.Tensor, num_experts_per_tok: int, score: str, normalize: bool, expert_bias: torch.Tensor | None
    ) -> Route:
        return Route(*RouteFunction.apply(router_logits, num_experts_per_tok, score == "sigmoid", normalize, expert_bias))

    return route


def experts_by(ops: Any, sums_stay_f32: bool = True) -> Callable[..., torch.Tensor]:
    """The op by `ops`, which has moe_experts_fwd and moe_experts_bwd. sums_stay_f32: the latter writes the
    gradients of the expert weights in f32, to be rounded afterwards; else it rounds them itself."""

    class ExpertsFunction(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any, x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor,
            has_backward: bool,
        ) -> torch.Tensor:
            x, gate_up, down, expert_ids = x.contiguous(), gate_up.contiguous(), down.contiguous(), expert_ids.contiguous()
            wide_weights = weights.float().contiguous()
            kept = x.new_empty(expert_ids.numel() if has_backward else 0, gate_up.shape[1])
            y = torch.empty_like(x)
            ops.moe_experts_fwd(y, kept, x, gate_up, down, expert_ids, wide_weights)
            ctx.save_for_backward(kept, x, gate_up, down, expert_ids, wide_weights)
            ctx.weights_dtype = weights.dtype
            return y

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            kept, x, gate_up, down, expert_ids, wide_weights = ctx.saved_tensors
            dx, dweights = torch.empty_like(x), torch.empty_like(wide_weights)
            dgate_up, ddown = (
                torch.empty(w.shape, dtype=torch.float32 if sums_stay_f32 else w.dtype, device=w.device) for w in (gate_up, down))
            ops.moe_experts_bwd(
                dx, dgate_up, ddown, dweights, grads[0].contiguous(), kept, x, gate_up, down, expert_ids, wide_weights)
            return dx, dgate_up.to(gate_up.dtype), ddown.to(down.dtype), None, dweights.to(ctx.weights_dtype), None

    def experts(
        x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        has_backward = torch.is_grad_enabled() and any(t.requires_grad for t in (x, gate_up, down, weights))
        y: torch.Tensor = ExpertsFunction.apply(x, gate_up, down, expert_ids, weights, has_backward)
        return y

    return experts
