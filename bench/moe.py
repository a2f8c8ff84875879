"""`experts` and `route` (kernels/moe/) against F.grouped_mm and peers, on shapes of training and decode."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from bench.cases import Case, Inputs, Setup, Side
from bench.peers.ops import liger_experts, scatter_experts
from bench.suite import main
from kernels.moe import experts, make_inputs, route
from kernels.moe.reference import experts_reference

BF16, F32 = torch.bfloat16, torch.float32
SHAPES = {"numbers": [((8192, 128, 8, 2048, 768), BF16), ((64, 128, 8, 2048, 768), BF16)],
          "small": [((4096, 8, 2, 128, 96), BF16), ((256, 8, 2, 128, 96), BF16), ((4096, 8, 2, 128, 96), F32)],
          "tiny": [((9, 4, 2, 12, 8), F32)]}
"""(T, E, k, D, I)"""


def by_grouped_mm(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Sort by expert, torch's grouped GEMMs, weighted sum over each token's experts."""
    order = torch.sort(expert_ids.flatten(), stable=True).indices
    ends = torch.bincount(expert_ids.flatten(), minlength=len(gate_up)).cumsum(0).int()
    gate, up = F.grouped_mm(x.index_select(0, order // expert_ids.shape[1]), gate_up.transpose(1, 2), offs=ends).chunk(2, -1)
    outputs = F.grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=ends)
    place = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=order.device))
    gathered = outputs.index_select(0, place).view(*expert_ids.shape, -1)
    return (gathered.float() * weights[..., None]).sum(1).to(x.dtype)


def grouped_mm(dtype: torch.dtype) -> Side | str:
    if not hasattr(F, "grouped_mm"):
        return "not in this torch"
    return Side(by_grouped_mm) if dtype == BF16 else "bf16 only"


def expert_case(setup: Setup, sizes: tuple[int, ...], dtype: torch.dtype) -> Case:
    t, e, k, d, i = sizes
    flops, touched = 2 * t * k * 3 * d * i, min(e, t * k) * 3 * d * i
    return Case(
        op="moe_experts", shape=f"T{t} E{e} H{d} I{i} K{k}", dtype=dtype, wanted=("x", "gate_up", "down", "weights"),
        exact=experts_reference, make=lambda: make_inputs(*sizes, dtype, str(setup.device)),
        sides={**setup.ours("moe_experts", experts, dtype), "F.grouped_mm": grouped_mm(dtype), **setup.compiled(experts_reference),
               "liger-kernel": liger_experts(setup.device), "scattermoe": scatter_experts(setup.device)},
        work={"forward": (flops, dtype.itemsize * (touched + 2 * t * d)),
              "backward": (2 * flops, dtype.itemsize * (2 * touched + 3 * t * d))})


def route_weights(router_logits: torch.Tensor, k: int, impl: str) -> tuple[torch.Tensor, torch.Tensor]:
    picked = route(router_logits, k, impl=impl)
    return picked.weights, picked.scores


def by_topk(router_logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Without a rule for ties."""
    scores = router_logits.softmax(-1)
    weights = scores.topk(k, -1).values
    return weights / weights.sum(-1, keepdim=True), scores


def route_case(setup: Setup, sizes: tuple[int, ...]) -> Case:
    t, e, k, *_ = sizes

    def make() -> Inputs:
        generator = torch.Generator(setup.device).manual_seed(0)
        return {"router_logits": torch.randn(t, e, generator=generator, device=setup.device)}
    by_reference = functools.partial(route_weights, k=k, impl="reference")
    return Case(
        op="moe_route", shape=f"T{t} E{e} K{k}", dtype=F32, wanted=("router_logits",), exact=by_reference, make=make,
        sides={**setup.ours("moe_route", functools.partial(route_weights, k=k), F32), "topk": Side(functools.partial(by_topk, k=k)),
               **setup.compiled(by_reference)},
        work={"forward": (0, 8 * t * e + 12 * t * k), "backward": (0, 8 * t * e + 12 * t * k)})


def cases(setup: Setup) -> list[Case]:
    found = [expert_case(setup, *shape) for shape in setup.pick(SHAPES)]
    routes = [route_case(setup, sizes) for sizes, dtype in setup.pick(SHAPES) if dtype == BF16 or setup.scale == "tiny"]
    return [*found[:1], *routes, *found[1:]]


if __name__ == "__main__":
    main("moe", cases)
