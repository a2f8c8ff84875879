"""The specification of the mixture of experts: route by a stable sort, loop over the experts, combine in
order of k."""

from __future__ import annotations

from typing import NamedTuple

import torch

from kernels.linear import linear
from kernels.swiglu import swiglu
from kernels.swiglu.reference import swiglu_reference


class Route(NamedTuple):
    expert_ids: torch.Tensor
    """i64[T, k]"""
    weights: torch.Tensor
    """f32[T, k]"""
    scores: torch.Tensor
    """f32[T, E]: softmax or sigmoid of the logits, over all experts."""


def route_reference(
    router_logits: torch.Tensor, num_experts_per_tok: int, score: str, normalize: bool, expert_bias: torch.Tensor | None
) -> Route:
    """router_logits f32[T, E] -> Route."""
    if score == "sigmoid":
        scores = 1 / (1 + torch.exp(-router_logits.clamp(min=-80.0)))
    else:
        raised = torch.exp(router_logits - router_logits.detach().amax(-1, keepdim=True))
        scores = raised / raised.sum(-1, keepdim=True)
    choice = scores.detach() if expert_bias is None else scores.detach() + expert_bias
    # A stable sort breaks ties by index; topk does not specify it.
    expert_ids = torch.sort(choice, dim=-1, descending=True, stable=True).indices[:, :num_experts_per_tok]
    weights = scores.gather(1, expert_ids)
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-20)
    return Route(expert_ids, weights, scores)


def expert_counts(expert_ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    """expert_ids i64[T, k] -> i64[E]; unlike bincount, without a device sync."""
    return expert_ids.new_zeros(num_experts).scatter_add_(0, expert_ids.flatten(), torch.ones_like(expert_ids).flatten())


def z_loss_reference(router_logits: torch.Tensor) -> torch.Tensor:
    """router_logits f32[T, E] -> f32[]."""
    return torch.logsumexp(router_logits, dim=-1).square().sum() / max(router_logits.shape[0], 1)


def load_balance_reference(scores: torch.Tensor, expert_ids: torch.Tensor) -> torch.Tensor:
    """scores f32[T, E], expert_ids i64[T, k] -> f32[]."""
    num_tokens, num_experts = scores.shape
    fraction = expert_counts(expert_ids, num_experts).to(scores.dtype) / max(expert_ids.numel(), 1)
    mean_score = (scores / scores.sum(-1, keepdim=True)).sum(0) / max(num_tokens, 1)
    return num_experts * (fraction * mean_score).sum()


def experts_reference(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """x [T, D], gate_up [E, 2I, D], down [E, D, I], expert_ids i64[T, k], weights f32[T, k] -> [T, D]."""
    gate_up, down = gate_up.to(x.dtype), down.to(x.dtype)
    rows, order, counts = _sort_by_expert(x, expert_ids, gate_up.shape[0])
    return _combine(_run_each(rows, counts.tolist(), gate_up, down), order, weights)


def experts_torch(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """The same by torch's own GEMMs: not batch-invariant."""
    rows, order, counts = _sort_by_expert(x, expert_ids, gate_up.shape[0])
    return _combine(_run_each(rows, counts.tolist(), gate_up.to(x.dtype), down.to(x.dtype), impl="torch"), order, weights)


def _sort_by_expert(
    x: torch.Tensor, expert_ids: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> (x's rows [T * k, D] sorted by expert, the (token, choice) pair of each, the number of rows of each
    expert)."""
    order = torch.sort(expert_ids.flatten(), stable=True).indices
    return x.index_select(0, order // expert_ids.shape[1]), order, torch.bincount(expert_ids.flatten(), minlength=num_experts)


def _combine(outputs: torch.Tensor, order: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """outputs [T * k, D] sorted by expert, weights f32[T, k] -> [T, D]."""
    num_tokens, k = weights.shape
    place = torch.empty_like(order).index_copy_(0, order, torch.arange(order.numel(), device=order.device))
    gathered = outputs.index_select(0, place).view(num_tokens, k, outputs.shape[1])  # [T, k, D], in token order
    gathered = gathered if gathered.dtype == torch.float64 else gathered.float()
    combined = gathered[:, 0] * weights[:, 0, None]
    for choice in range(1, k):  # in order of k, never by atomics
        combined = combined + gathered[:, choice] * weights[:, choice, None]
    return combined.to(outputs.dtype)


def _run_each(
    rows: torch.Tensor, counts: list[int], gate_up: torch.Tensor, down: torch.Tensor, impl: str = "reference"
) -> torch.Tensor:
    """rows [T * k, D] sorted by expert -> [T * k, D], one expert after the other."""
    inner = [linear(part, matrix, impl) for part, matrix in zip(rows.split(counts), gate_up.unbind(0), strict=True)]
    activated = (swiglu if impl == "torch" else swiglu_reference)(torch.cat(inner))  # [T * k, I]
    return torch.cat([linear(part, matrix, impl) for part, matrix in zip(activated.split(counts), down.unbind(0), strict=True)])


def make_inputs(
    num_tokens: int, num_experts: int, k: int, hidden_size: int, inner_size: int,
    dtype: torch.dtype, device: str = "cpu", seed: int = 0,
) -> dict[str, torch.Tensor]:
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    route = route_reference(draw(num_tokens, num_experts), k, "softmax", True, None)
    return {
        "x": draw(num_tokens, hidden_size).to(dtype),
        "gate_up": (draw(num_experts, 2 * inner_size, hidden_size) / hidden_size**0.5).to(dtype),
        "down": (draw(num_experts, hidden_size, inner_size) / inner_size**0.5).to(dtype),
        "expert_ids": route.expert_ids,
        "weights": route.weights if dtype != torch.float64 else route.weights.double(),
    }
