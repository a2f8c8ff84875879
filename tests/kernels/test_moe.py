"""Mixture of experts against a float64 loop over tokens: the choice and its ties, the combine, the balance loss, and the bits."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from kernels.linear.reference import MIN_ROWS
from kernels.moe import EXPERTS_OP, ROUTE_OP, experts, load_balance, make_inputs, route
from kernels.moe.reference import _run_batched, _run_each
from tests.kernels.compare import NUM_ROWS, THREADS, assert_no_worse_than_plain, assert_rows_keep_their_bits, same_bits

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
ARGUMENTS = ("x", "gate_up", "down", "expert_ids", "weights")
CPU = torch.device("cpu")
ROUTE_IMPLS = [i.name for i in ROUTE_OP.implementations if not i.refuses(CPU, F32)]
IMPLS = [i.name for i in EXPERTS_OP.implementations if not i.refuses(CPU, F32)]
EXACT_IMPLS = [name for name in IMPLS if name != "torch"]  # torch's GEMMs promise no bits


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_hand(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Token by token, choice by choice."""
    inner = down.shape[2]
    rows = []
    for token, chosen in enumerate(expert_ids.tolist()):
        total = torch.zeros_like(x[token])
        for choice, expert in enumerate(chosen):
            both = gate_up[expert] @ x[token]
            gate, up = both[:inner], both[inner:]
            total = total + weights[token, choice].to(x.dtype) * (down[expert] @ (gate * torch.sigmoid(gate) * up))
        rows.append(total)
    return torch.stack(rows)


def plain(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Every expert on every token, weighted by 0 where it was not chosen: matrix products in the operands' dtype."""
    total = torch.zeros_like(x)
    for expert in range(gate_up.shape[0]):
        gate, up = (x @ gate_up[expert].T).chunk(2, dim=1)
        share = torch.where(expert_ids == expert, weights, 0.0).sum(1, keepdim=True).to(x.dtype)
        total = total + share * ((F.silu(gate) * up) @ down[expert].T)
    return total


def route_by_hand(logits: list[float], k: int, score: str, bias: list[float]) -> tuple[list[int], list[float], list[float]]:
    """One token in Python floats: scores, then the k largest of score + bias, equal ones in order of index."""
    if score == "sigmoid":
        scores = [1 / (1 + math.exp(-z)) for z in logits]
    else:
        raised = [math.exp(z - max(logits)) for z in logits]
        scores = [r / sum(raised) for r in raised]
    chosen = sorted(range(len(logits)), key=lambda e: (-(scores[e] + bias[e]), e))[:k]
    return chosen, [scores[e] for e in chosen], scores


# --- route ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("impl", ROUTE_IMPLS)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("num_experts", "k"), [(1, 1), (2, 1), (8, 2), (7, 3), (4, 4), (47, 5), (256, 8)])
def test_route_is_its_definition(num_experts: int, k: int, score: str, normalize: bool, biased: bool, impl: str):
    logits, bias = 2 * draw(50, num_experts), 0.3 * draw(num_experts, seed=1)
    got = route(logits, k, score=score, normalize=normalize, expert_bias=bias if biased else None, impl=impl)
    for token, row in enumerate(logits.tolist()):
        chosen, weights, scores = route_by_hand(row, k, score, bias.tolist() if biased else [0.0] * num_experts)
        if normalize:
            weights = [w / sum(weights) for w in weights]
        assert got.expert_ids[token].tolist() == chosen
        # exp and one division in f32, and sums of at most 256: a few roundings of 6e-8
        assert got.weights[token].tolist() == pytest.approx(weights, rel=1e-6)
        assert got.scores[token].tolist() == pytest.approx(scores, rel=1e-6)
    assert got.expert_ids.dtype == torch.int64 and got.weights.dtype == got.scores.dtype == F32


@pytest.mark.parametrize("impl", ROUTE_IMPLS)
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_ties_go_to_the_lower_index(score: str, impl: str):
    logits = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 2.0, 2.0, 2.0], [3.0, 0.0, 3.0, 3.0]])
    assert route(logits, 2, score=score, impl=impl).expert_ids.tolist() == [[0, 1], [1, 2], [0, 2]]
    # and among many more than any small sort holds
    assert route(torch.zeros(3, 300), 5, score=score, impl=impl).expert_ids.tolist() == [[0, 1, 2, 3, 4]] * 3


@pytest.mark.parametrize("impl", ROUTE_IMPLS)
def test_the_bias_steers_the_choice_but_not_the_weights(impl: str):
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).requires_grad_()
    bias = torch.tensor([0.0, 0.0, 0.0, 5.0]).requires_grad_()
    plain, steered = (route(logits, 2, normalize=False, expert_bias=b, impl=impl) for b in (None, bias))
    assert plain.expert_ids.tolist() == [[0, 1]] and steered.expert_ids.tolist() == [[3, 0]]
    assert torch.equal(steered.weights, plain.scores[:, [3, 0]]) and torch.equal(steered.scores, plain.scores)
    dlogits, dbias = torch.autograd.grad(steered.weights.sum(), (logits, bias), allow_unused=True)
    assert dbias is None and dlogits.abs().sum() > 0


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_route_passes_the_gradient_of_its_weights(score: str, normalize: bool):
    """Against finite differences, where the choice does not move."""
    logits = draw(5, 6).double().requires_grad_()
    upstream = draw(5, 2, seed=2).double()

    def value(z: torch.Tensor) -> torch.Tensor:
        return (route(z, 2, score=score, normalize=normalize).weights * upstream).sum()

    assert torch.autograd.gradcheck(value, (logits,))


@pytest.mark.parametrize("impl", ROUTE_IMPLS)
def test_a_lone_normalised_expert_gives_its_router_no_gradient(impl: str):
    """k = 1 with normalize is weight 1 whatever the logits: known, and why such a model must not normalise."""
    logits = draw(5, 4).requires_grad_()
    picked = route(logits, 1, impl=impl)
    assert picked.weights.eq(1).all()
    assert torch.autograd.grad(picked.weights.sum(), logits)[0].abs().max() < 1e-6  # x / x has a rounding left, no slope


@pytest.mark.parametrize("impl", ROUTE_IMPLS)
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_logits_of_ten_thousand_route_to_finite_weights_and_gradients(score: str, impl: str):
    logits = torch.tensor([[1e4, -1e4, 0.0, 1.0], [-1e4, -1e4, -1e4, -1e4]]).requires_grad_()
    picked = route(logits, 2, score=score, impl=impl)
    picked.weights[:, 0].sum().backward()
    assert picked.weights.isfinite().all() and logits.grad is not None and logits.grad.isfinite().all()
    assert picked.expert_ids[0, 0] == 0 and picked.expert_ids[1].tolist() == [0, 1]


# --- experts -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("shape", [
    (20, 4, 2, 16, 12), (33, 8, 1, 24, 8), (1, 3, 3, 8, 5), (40, 8, 2, 32, 24), (123, 4, 3, 47, 33), (30, 64, 8, 33, 7),
    (47, 2, 1, 1, 3),
], ids=str)
def test_values_and_gradients_are_no_worse_than_plain(shape: tuple[int, int, int, int, int], dtype: torch.dtype, impl: str):
    inputs = make_inputs(*shape, dtype)
    assert_no_worse_than_plain(partial(experts, impl=impl), plain, by_hand, [inputs[name] for name in ARGUMENTS])


@pytest.mark.parametrize("impl", IMPLS)
def test_masters_in_f32_are_rounded_where_they_are_used_and_get_f32_gradients(impl: str):
    inputs = make_inputs(50, 4, 2, 24, 16, BF16)
    upstream = draw(50, 24, seed=3).bfloat16()
    results = []
    for dtype in (BF16, F32):
        matrices = [inputs[name].to(dtype).requires_grad_() for name in ("gate_up", "down")]
        out = experts(inputs["x"], *matrices, inputs["expert_ids"], inputs["weights"], impl=impl)
        results.append((out, torch.autograd.grad(out, matrices, upstream)))
    (out, rounded), (same, wide) = results
    assert same_bits(out, same)
    assert all(got.dtype == F32 and same_bits(got.bfloat16(), want) for got, want in zip(wide, rounded, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_experts_without_a_token_give_zero_gradients(impl: str):
    inputs = make_inputs(6, 5, 2, 8, 4, F32)
    inputs["expert_ids"] = torch.tensor([[3, 1]] * 6)
    gate_up, down = inputs["gate_up"].requires_grad_(), inputs["down"].requires_grad_()
    experts(**inputs, impl=impl).sum().backward()
    assert gate_up.grad is not None and down.grad is not None
    for expert in range(5):
        is_used = expert in (1, 3)
        assert bool(gate_up.grad[expert].abs().sum() > 0) == bool(down.grad[expert].abs().sum() > 0) == is_used


@pytest.mark.parametrize("impl", EXACT_IMPLS)
@pytest.mark.parametrize("expert", [0, 4])
def test_all_tokens_on_one_expert_is_a_dense_layer(expert: int, impl: str):
    inputs = make_inputs(50, 5, 1, 16, 12, F32)
    inputs["expert_ids"], inputs["weights"] = torch.full((50, 1), expert), torch.ones(50, 1)
    dense = make_inputs(50, 1, 1, 16, 12, F32)
    dense.update(x=inputs["x"], gate_up=inputs["gate_up"][expert : expert + 1], down=inputs["down"][expert : expert + 1],
                 weights=inputs["weights"])
    assert same_bits(experts(**inputs, impl=impl), experts(**dense, impl=impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_no_tokens_give_no_rows(impl: str):
    inputs = make_inputs(0, 4, 2, 8, 4, F32)
    gate_up = inputs["gate_up"].requires_grad_()
    out = experts(**inputs, impl=impl)
    assert out.shape == (0, 8)
    out.sum().backward()
    assert gate_up.grad is not None and not gate_up.grad.any()


@pytest.mark.parametrize("impl", EXACT_IMPLS)
def test_one_tokens_nan_does_not_reach_another(impl: str):
    inputs = make_inputs(30, 4, 2, 8, 4, F32)
    clean = experts(**inputs, impl=impl)
    inputs["x"][7] = torch.nan
    dirty = experts(**inputs, impl=impl)
    assert dirty[7].isnan().all()
    assert same_bits(torch.cat((dirty[:7], dirty[8:])), torch.cat((clean[:7], clean[8:])))


# --- bits ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("impl", EXACT_IMPLS)
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("shape", [(8, 2, 128, 96), (4, 2, 16, 8), (3, 3, 20, 12), (16, 4, 32, 5)], ids=str)
def test_a_token_has_the_same_bits_in_any_batch(shape: tuple[int, int, int, int], dtype: torch.dtype, impl: str):
    """However many others are sent to its experts."""
    inputs = make_inputs(NUM_ROWS, *shape, dtype)

    def rows(start: int, end: int) -> torch.Tensor:
        cut = {name: inputs[name][start:end] for name in ("x", "expert_ids", "weights")}
        return experts(cut["x"], inputs["gate_up"], inputs["down"], cut["expert_ids"], cut["weights"], impl=impl)

    assert_rows_keep_their_bits(rows)


@pytest.mark.parametrize("impl", ROUTE_IMPLS)
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("num_experts", "k"), [(2, 1), (8, 2), (15, 3), (16, 2), (17, 4), (128, 8)])
def test_a_token_is_routed_the_same_in_any_batch(num_experts: int, k: int, score: str, impl: str):
    logits, bias = draw(NUM_ROWS, num_experts), 0.1 * draw(num_experts, seed=1)
    assert_rows_keep_their_bits(
        lambda start, end: tuple(route(logits[start:end], k, score=score, expert_bias=bias, impl=impl)))


# --- load balance --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("k", [1, 2])
def test_load_balance_is_its_formula(k: int, score: str):
    picked = route(draw(30, 5), k, score=score)
    scores, chosen = picked.scores.tolist(), picked.expert_ids.flatten().tolist()
    expected = 5 * sum(
        chosen.count(e) / len(chosen) * sum(row[e] / sum(row) for row in scores) / len(scores) for e in range(5))
    assert float(load_balance(picked.scores, picked.expert_ids)) == pytest.approx(expected, rel=1e-6)  # sums of 30 in f32


def test_load_balance_is_one_when_even_and_the_number_of_experts_when_one_takes_all():
    even = torch.full((8, 4), 0.25)
    assert float(load_balance(even, torch.arange(8)[:, None] % 4)) == 1.0
    one = torch.tensor([[1.0, 0.0, 0.0, 0.0]]).repeat(8, 1)
    assert float(load_balance(one, torch.zeros(8, 1, dtype=torch.int64))) == 4.0
    assert float(load_balance(torch.zeros(0, 4), torch.zeros(0, 2, dtype=torch.int64))) == 0.0


def test_load_balance_pushes_the_crowded_expert_down():
    logits = torch.zeros(8, 4).requires_grad_()
    load_balance(torch.softmax(logits, dim=-1), torch.zeros(8, 1, dtype=torch.int64)).backward()
    assert logits.grad is not None and (logits.grad[:, 0] > 0).all() and (logits.grad[:, 1:] < 0).all()


# --- contracts -----------------------------------------------------------------------------------------------------------

def test_wrong_arguments_are_named_with_what_was_expected_and_what_came():
    logits, ids = torch.zeros(3, 4), torch.zeros(3, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"route: router_logits must be f32\|f64\[T, E\], got bf16\[3, 4\] on cpu"):
        route(logits.bfloat16(), 2)
    for k in (0, 5):
        with pytest.raises(ValueError, match=rf"route: num_experts_per_tok must be in 1\.\.4, got {k}"):
            route(logits, k)
    with pytest.raises(ValueError, match=r"route: score must be 'softmax' or 'sigmoid', got 'relu'"):
        route(logits, 2, score="relu")
    with pytest.raises(ValueError, match=r"route: expert_bias must be f32\|f64\[4\], got f32\[3\] on cpu"):
        route(logits, 2, expert_bias=torch.zeros(3))
    with pytest.raises(ValueError, match=r"load_balance: expert_ids must be i64\[3, k\], got i64\[2, 2\] on cpu"):
        load_balance(logits, ids[:2])
    inputs = make_inputs(3, 4, 2, 8, 6, F32)
    for name, bad, message in [
        ("x", inputs["x"][0], r"x must be .*\[T, D\], got f32\[8\]"),
        ("gate_up", inputs["gate_up"].bfloat16(), r"gate_up must be f32\[E, 2I, 8\], got bf16\[4, 12, 8\]"),
        ("down", inputs["down"][:, :, :5], r"down must be f32\[4, 8, 6\], got f32\[4, 8, 5\]"),
        ("expert_ids", inputs["expert_ids"].int(), r"expert_ids must be i64\[3, k\], got i32\[3, 2\]"),
        ("weights", inputs["weights"][:, :1], r"weights must be f32\|f64\[3, 2\], got f32\[3, 1\]"),
    ]:
        with pytest.raises(ValueError, match=f"experts: {message}"):
            experts(**{**inputs, name: bad})


@pytest.mark.parametrize("num_threads", THREADS)
@pytest.mark.parametrize("num_tokens", [1, 3, 16, 47, 128, 250])
def test_few_rows_run_as_one_batch_with_the_bits_of_the_loop(num_tokens: int, num_threads: int):
    torch.set_num_threads(num_threads)
    inputs = make_inputs(num_tokens, 8, 2, 128, 96, torch.float32)
    expert_of_row, order = torch.sort(inputs["expert_ids"].flatten(), stable=True)
    counts = torch.bincount(expert_of_row, minlength=8)
    rows = inputs["x"].index_select(0, order // 2)
    capacity = max(MIN_ROWS, int(counts.max()))
    batched = _run_batched(rows, expert_of_row, counts, capacity, inputs["gate_up"], inputs["down"])
    assert same_bits(batched, _run_each(rows, counts.tolist(), inputs["gate_up"], inputs["down"]))
