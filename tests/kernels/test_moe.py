"""Mixture of experts against a float64 loop over tokens: routing and its ties, the weighted sum, the balance
loss, and the bits."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from kernels.moe import EXPERTS_OP, ROUTE_OP, expert_counts, experts, load_balance, make_inputs, route, z_loss
from kernels.triton_ops import IS_INTERPRETED
from tests.kernels.compare import (
    NUM_ROWS,
    assert_no_worse_than_plain,
    assert_rows_keep_their_bits,
    same_bits,
    values_and_gradients,
)
from tests.kernels.implementations import each_implementation

implementation = each_implementation(ROUTE_OP, EXPERTS_OP)

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
Tensors = dict[str, torch.Tensor]
ARGUMENTS = ("x", "gate_up", "down", "expert_ids", "weights")

def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uneven(num_tokens: int, num_experts: int, k: int, dtype: torch.dtype, hidden: int = 24, inner: int = 20) -> Tensors:
    """Most tokens on the last experts, none on the first: an expert of several tiles, many blocks, and empty ones."""
    inputs = make_inputs(num_tokens, num_experts, k, hidden, inner, dtype)
    logits = draw(num_tokens, num_experts, seed=4) + torch.arange(num_experts) ** 2 * (12 / num_experts**2)
    logits[:, 0] = -100
    inputs["expert_ids"] = logits.topk(k).indices
    return inputs


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
    """Every expert on every token, with weight 0 if it was not chosen: matrix products in the operands' dtype."""
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

@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("num_experts", "k"), [(1, 1), (7, 3), (4, 4), (256, 8)] if IS_INTERPRETED else [
    (1, 1), (2, 1), (8, 2), (7, 3), (4, 4), (47, 5), (256, 8)])
def test_route_is_its_definition(num_experts: int, k: int, score: str, normalize: bool, biased: bool):
    logits, bias = 2 * draw(50, num_experts), 0.3 * draw(num_experts, seed=1)
    got = route(logits, k, score=score, normalize=normalize, expert_bias=bias if biased else None)
    for token, row in enumerate(logits.tolist()):
        chosen, weights, scores = route_by_hand(row, k, score, bias.tolist() if biased else [0.0] * num_experts)
        if normalize:
            weights = [w / sum(weights) for w in weights]
        assert got.expert_ids[token].tolist() == chosen
        # exp and one division in f32, and sums of at most 256: a few roundings of 6e-8
        assert got.weights[token].tolist() == pytest.approx(weights, rel=1e-6)
        assert got.scores[token].tolist() == pytest.approx(scores, rel=1e-6)
    assert got.expert_ids.dtype == torch.int64 and got.weights.dtype == got.scores.dtype == F32


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_ties_go_to_the_lower_index(score: str):
    logits = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 2.0, 2.0, 2.0], [3.0, 0.0, 3.0, 3.0]])
    assert route(logits, 2, score=score).expert_ids.tolist() == [[0, 1], [1, 2], [0, 2]]
    # and among many more than any small sort holds
    assert route(torch.zeros(3, 300), 5, score=score).expert_ids.tolist() == [[0, 1, 2, 3, 4]] * 3


def test_the_bias_steers_the_choice_but_not_the_weights():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).requires_grad_()
    bias = torch.tensor([0.0, 0.0, 0.0, 5.0]).requires_grad_()
    plain, steered = (route(logits, 2, normalize=False, expert_bias=b) for b in (None, bias))
    assert plain.expert_ids.tolist() == [[0, 1]] and steered.expert_ids.tolist() == [[3, 0]]
    assert torch.equal(steered.weights, plain.scores[:, [3, 0]]) and torch.equal(steered.scores, plain.scores)
    dlogits, dbias = torch.autograd.grad(steered.weights.sum(), (logits, bias), allow_unused=True)
    assert dbias is None and dlogits.abs().sum() > 0


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_route_passes_the_gradient_of_its_weights(score: str, normalize: bool):
    """Against finite differences at logits where the routed experts do not change."""
    logits = draw(5, 6).double().requires_grad_()
    upstream = draw(5, 2, seed=2).double()

    def value(z: torch.Tensor) -> torch.Tensor:
        return (route(z, 2, score=score, normalize=normalize).weights * upstream).sum()

    assert torch.autograd.gradcheck(value, (logits,))


def test_a_lone_normalised_expert_gives_its_router_no_gradient():
    """k = 1 with normalize gives weight 1 for any logits, which is why such a model must not normalise."""
    logits = draw(5, 4).requires_grad_()
    picked = route(logits, 1)
    assert picked.weights.eq(1).all()
    assert torch.autograd.grad(picked.weights.sum(), logits)[0].abs().max() < 1e-6  # x / x has no slope, only rounding


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_logits_of_ten_thousand_route_to_finite_weights_and_gradients(score: str):
    logits = torch.tensor([[1e4, -1e4, 0.0, 1.0], [-1e4, -1e4, -1e4, -1e4]]).requires_grad_()
    picked = route(logits, 2, score=score)
    picked.weights[:, 0].sum().backward()
    assert picked.weights.isfinite().all() and logits.grad is not None and logits.grad.isfinite().all()
    assert picked.expert_ids[0, 0] == 0 and picked.expert_ids[1].tolist() == [0, 1]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("num_experts", "k"), [(1, 1), (8, 2), (47, 3), (256, 8)])
def test_routes_gradient_of_weights_and_scores_is_the_references(num_experts: int, k: int, score: str, normalize: bool):
    logits, dweights, dscores = draw(33, num_experts), draw(33, k, seed=1), draw(33, num_experts, seed=2)

    def gradient(wanted: str, impl: str, dtype: torch.dtype) -> torch.Tensor:
        leaf = logits.to(dtype).requires_grad_()
        picked = route(leaf, k, score=score, normalize=normalize, impl=impl)
        value = sum(part for name, part in (("w", (picked.weights * dweights).sum()), ("s", (picked.scores * dscores).sum()))
                    if name in wanted)
        return torch.autograd.grad(value, leaf)[0]

    for wanted in ("w", "s", "ws"):
        truth, want, got = (gradient(wanted, *how) for how in (
            ("reference", torch.float64), ("reference", F32), ("auto", F32)))
        # As far from float64 as the reference, or a few f32 roundings of the largest.
        allowed = 1.1 * (want - truth).abs().max() + 4e-7 * max(1, truth.abs().max())
        assert float((got - truth).abs().max()) <= float(allowed)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_a_broken_logit_still_routes_to_experts_that_exist(score: str):
    logits = torch.zeros(4, 5)
    logits[0, 3], logits[1, 2], logits[2, 1] = torch.nan, torch.inf, -torch.inf
    ours, theirs = (route(logits, 2, score=score, impl=impl) for impl in ("auto", "reference"))
    assert torch.equal(ours.expert_ids, theirs.expert_ids)
    assert torch.equal(ours.scores.isnan(), theirs.scores.isnan())


# --- experts -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("shape", [
    (33, 8, 1, 24, 8), (1, 3, 3, 8, 5), (123, 4, 3, 47, 33), (47, 2, 1, 1, 3), (40, 2, 1, 70, 66),
    *([] if IS_INTERPRETED else [(20, 4, 2, 16, 12), (40, 8, 2, 32, 24), (30, 64, 8, 33, 7)]),
], ids=str)
def test_values_and_gradients_are_no_worse_than_plain(shape: tuple[int, int, int, int, int], dtype: torch.dtype):
    inputs = make_inputs(*shape, dtype)
    assert_no_worse_than_plain(experts, plain, by_hand, [inputs[name] for name in ARGUMENTS])


def test_masters_in_f32_are_rounded_where_they_are_used_and_get_f32_gradients():
    inputs = make_inputs(50, 4, 2, 24, 16, BF16)
    upstream = draw(50, 24, seed=3).bfloat16()
    results = []
    for dtype in (BF16, F32):
        matrices = [inputs[name].to(dtype).requires_grad_() for name in ("gate_up", "down")]
        out = experts(inputs["x"], *matrices, inputs["expert_ids"], inputs["weights"])
        results.append((out, torch.autograd.grad(out, matrices, upstream)))
    (out, rounded), (same, wide) = results
    assert same_bits(out, same)
    assert all(got.dtype == F32 and same_bits(got.bfloat16(), want) for got, want in zip(wide, rounded, strict=True))


def test_experts_without_a_token_give_zero_gradients():
    inputs = make_inputs(6, 5, 2, 8, 4, F32)
    inputs["expert_ids"] = torch.tensor([[3, 1]] * 6)
    gate_up, down = inputs["gate_up"].requires_grad_(), inputs["down"].requires_grad_()
    experts(**inputs).sum().backward()
    assert gate_up.grad is not None and down.grad is not None
    for expert in range(5):
        is_used = expert in (1, 3)
        assert bool(gate_up.grad[expert].abs().sum() > 0) == bool(down.grad[expert].abs().sum() > 0) == is_used


@pytest.mark.parametrize("expert", [0, 4])
def test_all_tokens_on_one_expert_is_a_dense_layer(expert: int):
    inputs = make_inputs(50, 5, 1, 16, 12, F32)
    inputs["expert_ids"], inputs["weights"] = torch.full((50, 1), expert), torch.ones(50, 1)
    dense = make_inputs(50, 1, 1, 16, 12, F32)
    dense.update(x=inputs["x"], gate_up=inputs["gate_up"][expert : expert + 1], down=inputs["down"][expert : expert + 1],
                 weights=inputs["weights"])
    assert same_bits(experts(**inputs), experts(**dense))


def test_no_tokens_give_no_rows():
    inputs = make_inputs(0, 4, 2, 8, 4, F32)
    gate_up = inputs["gate_up"].requires_grad_()
    out = experts(**inputs)
    assert out.shape == (0, 8)
    out.sum().backward()
    assert gate_up.grad is not None and not gate_up.grad.any()


def test_one_tokens_nan_does_not_reach_another():
    inputs = make_inputs(30, 4, 2, 8, 4, F32)
    clean = experts(**inputs)
    inputs["x"][7] = torch.nan
    dirty = experts(**inputs)
    assert dirty[7].isnan().all()
    assert same_bits(torch.cat((dirty[:7], dirty[8:])), torch.cat((clean[:7], clean[8:])))


@pytest.mark.parametrize(("num_experts", "k"), [(128, 2)] if IS_INTERPRETED else [(128, 2), (256, 8)])
def test_most_experts_may_be_empty(num_experts: int, k: int):
    """All tokens on the last k."""
    inputs = make_inputs(5, num_experts, k, 8, 4, F32)
    inputs["expert_ids"] = num_experts - 1 - torch.arange(k).expand(5, k)
    assert_no_worse_than_plain(experts, plain, by_hand, [inputs[name] for name in ARGUMENTS])


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_two_runs_have_the_same_bits(dtype: torch.dtype):
    inputs = uneven(100, 5, 2, dtype)
    arguments = [inputs[name] for name in ARGUMENTS]
    assert all(map(same_bits, values_and_gradients(experts, arguments), values_and_gradients(experts, arguments)))


def test_the_result_has_the_same_bits_without_a_gradient():
    inputs = make_inputs(20, 4, 2, 8, 4, F32)
    with_gradient = {**inputs, "x": inputs["x"].clone().requires_grad_()}
    assert same_bits(experts(**with_gradient).detach(), experts(**inputs))


def test_many_tokens_are_routed_in_one_batch():
    """More than 65,536, which some grids cannot hold."""
    logits = draw(66_000, 4)
    assert all(map(same_bits, (part[-3:] for part in route(logits, 2)), route(logits[-3:], 2)))


def test_transposed_matrices_give_the_same_bits():
    inputs = make_inputs(20, 3, 2, 8, 6, F32)
    moved = {name: tensor.transpose(0, -1).contiguous().transpose(0, -1) for name, tensor in inputs.items()}
    assert same_bits(experts(**moved), experts(**inputs))


def test_torchs_own_products_are_right_too():
    inputs = make_inputs(33, 8, 2, 24, 8, F32)
    assert_no_worse_than_plain(partial(experts, impl="torch"), plain, by_hand, [inputs[name] for name in ARGUMENTS])


# --- bits ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [F32, BF16])
def test_an_experts_gradient_does_not_depend_on_the_loads_of_the_others(dtype: torch.dtype):
    inputs = make_inputs(150, 4, 1, 24, 16, dtype)
    alone = dict(inputs, **{name: inputs[name][inputs["expert_ids"][:, 0] == 2] for name in ("x", "expert_ids", "weights")})
    dy = draw(150, 24, seed=6).to(dtype)
    upstreams = (dy, dy[inputs["expert_ids"][:, 0] == 2])
    results: list[list[torch.Tensor]] = []
    for given, upstream in zip((inputs, alone), upstreams, strict=True):
        matrices = [given[name].detach().requires_grad_() for name in ("gate_up", "down")]
        out = experts(given["x"], *matrices, given["expert_ids"], given["weights"])
        results.append([gradient[2] for gradient in torch.autograd.grad(out, matrices, upstream)])
    assert all(map(same_bits, *results))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("shape", [(4, 2, 24, 40)] if IS_INTERPRETED else [
    (8, 2, 128, 96), (4, 2, 16, 8), (3, 3, 20, 12), (16, 4, 32, 5)], ids=str)
def test_a_token_has_the_same_bits_in_any_batch(shape: tuple[int, int, int, int], dtype: torch.dtype):
    """For any number of other tokens that its experts get."""
    inputs = make_inputs(NUM_ROWS, *shape, dtype)

    def rows(start: int, end: int) -> torch.Tensor:
        cut = {name: inputs[name][start:end] for name in ("x", "expert_ids", "weights")}
        return experts(cut["x"], inputs["gate_up"], inputs["down"], cut["expert_ids"], cut["weights"])

    assert_rows_keep_their_bits(rows)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("num_experts", "k"), [(17, 4), (128, 8)] if IS_INTERPRETED else [
    (2, 1), (8, 2), (15, 3), (16, 2), (17, 4), (128, 8)])
def test_a_token_is_routed_the_same_in_any_batch(num_experts: int, k: int, score: str):
    logits, bias = draw(NUM_ROWS, num_experts), 0.1 * draw(num_experts, seed=1)
    assert_rows_keep_their_bits(
        lambda start, end: tuple(route(logits[start:end], k, score=score, expert_bias=bias)))


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


def test_z_loss_is_the_mean_square_of_the_log_of_the_sum_and_pulls_it_to_zero():
    logits = (2 * draw(30, 5) - 2).requires_grad_()
    expected = sum(math.log(sum(math.exp(z) for z in row)) ** 2 for row in logits.tolist()) / 30
    value = z_loss(logits)
    assert float(value.detach()) == pytest.approx(expected, rel=1e-6)  # sums of 30 in f32
    (gradient,) = torch.autograd.grad(value, logits)
    above = torch.logsumexp(logits.detach(), dim=1) > 0
    assert above.any() and not above.all()
    assert torch.equal((gradient > 0).all(1), above) and torch.equal((gradient < 0).all(1), ~above)
    assert float(z_loss(torch.zeros(0, 4))) == 0.0


def test_experts_are_counted():
    assert expert_counts(torch.tensor([[3, 1], [1, 0], [3, 1]]), 5).tolist() == [1, 3, 0, 2, 0]
    assert expert_counts(torch.zeros(0, 2, dtype=torch.int64), 2).tolist() == [0, 0]


# --- contracts -----------------------------------------------------------------------------------------------------------

def test_wrong_arguments_raise_with_expected_and_actual():
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
    with pytest.raises(ValueError, match=r"z_loss: router_logits must be f32\|f64\[T, E\], got bf16\[3, 4\] on cpu"):
        z_loss(logits.bfloat16())
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
