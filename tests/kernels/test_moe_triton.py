"""The Triton experts' sort and tiles against torch's stable sort, and the GPU's results for invalid expert ids."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from kernels.moe import experts, make_inputs, route
from kernels.moe.triton_plan import make_plan
from kernels.triton_ops import IS_INTERPRETED
from tests.kernels.compare import same_bits, values_and_gradients

DEVICE = "cpu" if IS_INTERPRETED else "cuda"
pytestmark = [] if IS_INTERPRETED else [pytest.mark.gpu]


def draw_ids(num_tokens: int, num_experts: int, k: int, skew: float) -> torch.Tensor:
    """skew 0: even; the larger, the more of them go to expert 0."""
    spread = torch.rand(num_tokens, k, generator=torch.Generator().manual_seed(0)) ** (1 + skew)
    return (spread * num_experts).long()


@pytest.mark.parametrize(("skew", "max_chunks"), [(0.0, 128), (9.0, 2)])
@pytest.mark.parametrize(("num_tokens", "num_experts", "k"), [
    (1, 1, 1), (3, 8, 2), (47, 128, 8), (300, 5, 3), (150, 256, 2), (5_000, 2, 1)])
def test_the_plan_is_a_stable_sort_cut_into_tiles(
    num_tokens: int, num_experts: int, k: int, skew: float, max_chunks: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("kernels.moe.triton_plan.MAX_CHUNKS", max_chunks)
    expert_ids = draw_ids(num_tokens, num_experts, k, skew).to(DEVICE)
    plan = make_plan(expert_ids, num_experts, 64)
    expert_of_row, order = torch.sort(expert_ids.flatten(), stable=True)
    assert torch.equal(plan.pairs.long(), order)
    assert torch.equal(plan.rows.long(), torch.argsort(order))
    counts = torch.bincount(expert_of_row, minlength=num_experts)
    assert plan.bounds.tolist() == [0, *counts.cumsum(0).tolist()]
    covered = []
    for expert, first, end in plan.tiles.T.tolist():
        if expert >= 0:
            assert end == plan.bounds[expert + 1] and (first - int(plan.bounds[expert])) % 64 == 0
            covered += [(expert, row) for row in range(first, min(end, first + 64))]
    assert covered == list(zip(expert_of_row.tolist(), range(expert_ids.numel()), strict=True))


@pytest.mark.parametrize("bad", [-1, 4, 2**62, -(2**62)])
def test_a_token_sent_to_no_expert_becomes_nan_and_no_other_does(bad: int):
    inputs = {name: tensor.to(DEVICE) for name, tensor in make_inputs(9, 4, 2, 8, 4, torch.float32).items()}
    clean = experts(**inputs, impl="triton")
    inputs["expert_ids"][3, 1] = bad
    leaf = inputs["weights"].requires_grad_()
    out = experts(**inputs, impl="triton")
    assert out[3].isnan().all()
    others = [0, 1, 2, 4, 5, 6, 7, 8]
    assert same_bits(out[others].detach(), clean[others])
    (dweights,) = torch.autograd.grad(out[others].sum(), leaf)
    assert dweights[3, 1].isnan() and dweights[others].isfinite().all()


@pytest.mark.skipif(not IS_INTERPRETED, reason="traced on the CPU")
def test_the_triton_ops_compile_without_a_graph_break():
    inputs, logits = make_inputs(9, 4, 2, 8, 4, torch.float32), torch.randn(9, 4)

    def layer(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        picked = route(logits, 2, impl="triton")
        return experts(x, gate_up, down, picked.expert_ids, picked.weights, impl="triton")

    arguments = [inputs["x"], inputs["gate_up"], inputs["down"], logits]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert all(map(same_bits, values_and_gradients(compiled, arguments), values_and_gradients(layer, arguments)))
