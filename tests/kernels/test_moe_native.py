"""The native mixture of experts: bits of the gradients, poisoned outputs, uneven loads, large sizes, bad arguments to the ops."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from kernels import moe
from kernels.moe import experts, route
from kernels.native import ISA, OPS
from tests.kernels.compare import THREADS, assert_no_worse_than_plain, same_bits, values_and_gradients
from tests.kernels.test_moe import ARGUMENTS, BF16, F32, Tensors, by_hand, draw, plain, uneven

pytestmark = pytest.mark.skipif(not ISA, reason="needs the native library")


def make_inputs(*size: int, dtype: torch.dtype) -> Tensors:
    """Contiguous, for the ops themselves."""
    return {name: tensor.contiguous() for name, tensor in moe.make_inputs(*size, dtype).items()}


def forward(inputs: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    x, gate_up = inputs["x"], inputs["gate_up"]
    y, kept = torch.full_like(x, torch.nan), torch.full((inputs["expert_ids"].numel(), gate_up.shape[1]), torch.nan).to(x.dtype)
    OPS.moe_experts_fwd(y, kept, *(inputs[name] for name in ARGUMENTS))
    return y, kept


def backward(inputs: Tensors) -> list[torch.Tensor]:
    """Everything the native ops write, from poisoned memory."""
    y, kept = forward(inputs)
    shapes = {"x": inputs["x"].dtype, "gate_up": F32, "down": F32, "weights": F32}
    gradients = [torch.full(inputs[name].shape, torch.nan, dtype=dtype) for name, dtype in shapes.items()]
    dy = draw(*y.shape, seed=5).to(y.dtype)
    OPS.moe_experts_bwd(*gradients, dy, kept, *(inputs[name] for name in ARGUMENTS))
    return [y, kept, *gradients]


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("size", [(1, 3, 2), (47, 2, 1), (123, 256, 8), (1100, 3, 2)], ids=str)
def test_two_runs_and_two_threads_give_the_same_bits_and_write_every_element(size: tuple[int, int, int], dtype: torch.dtype):
    inputs, runs = uneven(*size, dtype), []
    for threads in (*THREADS, 1):
        torch.set_num_threads(threads)
        runs.append(backward(inputs))
    assert not any(result.isnan().any() for result in runs[0])
    assert all(same_bits(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_an_expert_with_several_pieces_has_its_gradients(dtype: torch.dtype):
    """More rows than one product of a weight's gradient sums over, and more than one group holds."""
    inputs = uneven(1100, 3, 2, dtype)
    assert_no_worse_than_plain(partial(experts, impl="native"), plain, by_hand, [inputs[name] for name in ARGUMENTS])


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_native_and_reference_agree_at_the_models_sizes(dtype: torch.dtype):
    inputs = make_inputs(300, 8, 2, 128, 128, dtype=dtype)
    arguments = [inputs[name] for name in ARGUMENTS]
    ours, theirs = (values_and_gradients(partial(experts, impl=impl), arguments) for impl in ("native", "reference"))
    # One rounding of a result apart: 2^-8 of the largest in bf16, and f32 sums of some hundred terms.
    for got, want in zip(ours, theirs, strict=True):
        assert float((got - want).abs().max()) <= (1e-2 if dtype == BF16 else 2e-6) * float(want.abs().max())


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_large_sizes_are_right(dtype: torch.dtype):
    inputs = make_inputs(9, 3, 2, 2048, 768, dtype=dtype)
    got = experts(**inputs, impl="native").double()
    want = by_hand(*(inputs[name].double() if inputs[name].is_floating_point() else inputs[name] for name in ARGUMENTS))
    assert float((got - want).abs().max()) <= (2e-2 if dtype == BF16 else 2e-6) * float(want.abs().max())  # as above


def test_nothing_is_kept_without_a_gradient():
    inputs = make_inputs(20, 4, 2, 8, 4, dtype=F32)
    y, empty = torch.empty_like(inputs["x"]), torch.empty(0, 8)
    OPS.moe_experts_fwd(y, empty, *(inputs[name] for name in ARGUMENTS))
    assert same_bits(y, forward(inputs)[0])


def test_the_ops_compile_without_a_graph_break():
    inputs, logits = make_inputs(9, 4, 2, 8, 4, dtype=F32), draw(9, 4).requires_grad_()
    leaves = [inputs["x"].requires_grad_(), inputs["gate_up"].requires_grad_(), inputs["down"].requires_grad_(), logits]

    def layer(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        picked = route(logits, 2, impl="native")
        return experts(x, gate_up, down, picked.expert_ids, picked.weights, impl="native")

    results = []
    for run in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        out = run(*leaves)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    assert all(map(same_bits, *results))


@pytest.mark.parametrize("bad", [-1, 4, 2**62, -(2**62)])
def test_expert_ids_out_of_range_raise_before_anything_is_read(bad: int):
    inputs = make_inputs(5, 4, 2, 8, 4, dtype=F32)
    inputs["expert_ids"][3, 1] = bad
    where = rf"expert_ids must be in 0\.\.3, got {bad} at token 3, choice 1"
    with pytest.raises(RuntimeError, match=f"moe_experts_fwd: {where}"):
        experts(**inputs, impl="native")
    y, kept = torch.empty(5, 8), torch.empty(10, 8)
    out = [torch.empty(inputs[name].shape) for name in ("x", "gate_up", "down", "weights")]
    with pytest.raises(RuntimeError, match=f"moe_experts_bwd: {where}"):
        OPS.moe_experts_bwd(*out, y, kept, *(inputs[name] for name in ARGUMENTS))
    with pytest.raises(RuntimeError, match=f"moe_route_bwd: {where}"):
        OPS.moe_route_bwd(torch.empty(5, 4), torch.ones(5, 2), None, inputs["expert_ids"], torch.ones(5, 4), False, True)


def test_bad_tensors_given_straight_to_the_native_ops_raise():
    inputs = make_inputs(5, 4, 2, 8, 6, dtype=F32)
    good = {"y": torch.empty(5, 8), "kept": torch.empty(10, 12), **{name: inputs[name] for name in ARGUMENTS}}
    for name, bad, message in [
        ("y", torch.empty(5, 7), r"y must be f32\[5, 8\]"), ("kept", torch.empty(9, 12), r"kept must be f32\[10, 12\]"),
        ("kept", torch.empty(0), r"kept must be f32\[0, 12\]"), ("x", inputs["x"][0], r"x, down and expert_ids must be"),
        ("x", inputs["x"].double(), r"x must be f32 or bf16"),
        ("gate_up", inputs["gate_up"][:, :11].contiguous(), r"gate_up must be f32\[4, 12, 8\]"),
        ("gate_up", inputs["gate_up"].bfloat16(), r"gate_up must be f32\[4, 12, 8\].*got bf16"),
        ("down", inputs["down"].transpose(1, 2).contiguous().transpose(1, 2), r"down must be .*not contiguous"),
        ("expert_ids", inputs["expert_ids"].int(), r"expert_ids must be i64\[5, 2\]"),
        ("expert_ids", inputs["expert_ids"][:, :0], r".* with k >= 1"),
        ("weights", inputs["weights"][:4], r"weights must be f32\[5, 2\]"),
    ]:
        with pytest.raises(RuntimeError, match=f"moe_experts_fwd: {message}"):
            OPS.moe_experts_fwd(*{**good, name: bad}.values())
    ids, weights, scores, logits = torch.empty(3, 2, dtype=torch.int64), torch.empty(3, 2), torch.empty(3, 4), torch.zeros(3, 4)
    for arguments, message in [
        ((ids, weights, scores[:2], logits, None), r"scores must be f32\[3, 4\]"),
        ((ids[:, :0], weights, scores, logits, None), r"expert_ids must hold 1\.\.4 choices, got 0"),
        ((ids.new_empty(3, 5), weights, scores, logits, None), r"expert_ids must hold 1\.\.4 choices, got 5"),
        ((ids, weights, scores, logits, torch.zeros(3)), r"bias must be f32\[4\]"),
        ((ids, weights, scores, logits.bfloat16(), None), r"logits must be f32\[3, 4\]"),
    ]:
        with pytest.raises(RuntimeError, match=f"moe_route_fwd: {message}"):
            OPS.moe_route_fwd(*arguments, False, True)
