"""linear_logprob: logprob and entropy against float64, far logits, temperature, gradients, and bits in any batch."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from kernels.linear_logprob import OP, function, linear_logprob, make_inputs
from kernels.triton_ops import IS_INTERPRETED
from tests.kernels.compare import (
    NUM_ROWS,
    ROWS,
    THREADS,
    assert_no_worse_than_plain,
    assert_rows_keep_their_bits,
    same_bits,
    values_and_gradients,
)
from tests.kernels.implementations import each_implementation

implementation = each_implementation(OP)

F32, BF16 = torch.float32, torch.bfloat16
TEMPERATURES = [1.0, 0.6, 2.5]


def definition(
    hidden: torch.Tensor, weight: torch.Tensor, target_ids: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """By torch's log_softmax in the operands' dtype (logprobs of bf16 operands in f32, as a trainer would)."""
    logits = hidden @ weight.T / temperature
    logprobs = F.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)
    return logprobs.gather(1, target_ids[:, None]).squeeze(1), -(logprobs.exp() * logprobs).sum(-1)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("shape", [(20, 16, 43), (33, 64, 128), (17, 8, 5), (3, 4, 1)], ids=str)
def test_values_and_gradients_are_no_worse_than_log_softmax(shape: tuple[int, int, int], temperature: float, dtype: torch.dtype):
    op, plain = (
        lambda hidden, weight, ids, f=f: f(hidden, weight, ids, temperature) for f in (linear_logprob, definition))
    assert_no_worse_than_plain(op, plain, plain, list(make_inputs(*shape, dtype).values()))


def test_one_token_by_hand():
    hidden, weight = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 0.0], [math.log(2), 0.0], [0.0, math.log(5) / 2]])
    # logits 0, log 2, log 5: probabilities 1/8, 2/8, 5/8
    for target, p in enumerate([1 / 8, 2 / 8, 5 / 8]):
        logprob, entropy = linear_logprob(hidden, weight, torch.tensor([target]))
        assert float(logprob) == pytest.approx(math.log(p), rel=1e-6)  # a few roundings of 6e-8
        assert float(entropy) == pytest.approx(-sum(q * math.log(q) for q in (1 / 8, 2 / 8, 5 / 8)), rel=1e-6)


def test_temperature_divides_the_logits():
    inputs = make_inputs(9, 16, 20, F32)
    cooled = linear_logprob(**inputs, temperature=0.5)
    doubled = linear_logprob(inputs["hidden"] * 2, inputs["weight"], inputs["target_ids"])  # exact: a power of two
    assert all(map(same_bits, cooled, doubled))


@pytest.mark.parametrize("far", [1e2, 1e4, -1e4])
def test_a_shift_of_all_logits_changes_nothing_even_at_ten_thousand(far: float):
    """The logits' differences stay exact in f32 after the shift, so the logprobs change by a few ulp at most."""
    near = torch.tensor([[0.0, 0.5, -1.0, 2.0, 1.5]])
    hidden, targets = torch.tensor([[1.0, far]]), torch.tensor([2])
    weight = torch.stack((near[0], torch.ones(5)), dim=1)
    shifted = linear_logprob(hidden, weight, targets)
    still = linear_logprob(near, torch.eye(5), targets)
    for a, b in zip(shifted, still, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=5e-7)  # 2 ulp of 3


def test_logits_ten_thousand_apart_stay_finite_with_their_gradients():
    hidden = torch.tensor([[1e4], [-1e4]]).requires_grad_()
    weight = torch.tensor([[1.0], [-1.0], [0.5]]).requires_grad_()
    logprob, entropy = linear_logprob(hidden, weight, torch.tensor([0, 0]))
    assert logprob.tolist() == [0.0, -2e4] and entropy.tolist() == [0.0, 0.0]
    dhidden, dweight = torch.autograd.grad(logprob.sum() + entropy.sum(), (hidden, weight))
    assert dhidden.tolist() == [[0.0], [2.0]] and dweight.isfinite().all()


@pytest.mark.parametrize("vocab_size", [2, 43, 1024])
def test_equal_logits_give_the_uniform_distribution(vocab_size: int):
    hidden = torch.tensor([[0.0, 0.0], [3.0, 1e4]])
    logprob, entropy = linear_logprob(hidden, torch.ones(vocab_size, 2), torch.tensor([0, vocab_size - 1]))
    # log V rounded to f32, plus the roundings of V times log(V) / V
    torch.testing.assert_close(logprob, torch.full((2,), -math.log(vocab_size)), rtol=2e-7, atol=0)
    torch.testing.assert_close(entropy, torch.full((2,), math.log(vocab_size)), rtol=1e-6, atol=0)


def test_bf16_operands_give_f32_logprobs_without_rounding_the_logits():
    """Logits near 30 in bf16 step by 0.125: rounding them would show at once."""
    inputs = make_inputs(64, 64, 128, BF16)
    inputs["hidden"] *= 8
    got = linear_logprob(**inputs)
    want = definition(inputs["hidden"].double(), inputs["weight"].double(), inputs["target_ids"])
    for a, b in zip(got, want, strict=True):
        assert a.dtype == F32
        torch.testing.assert_close(a.double(), b, rtol=0, atol=3e-5)  # sums of 64 terms, of size 10, in f32


def test_gradients_are_those_of_the_formula():
    """Against finite differences in float64, of logprob and entropy together."""
    inputs = make_inputs(4, 3, 5, torch.float64)

    def value(hidden: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return linear_logprob(hidden, weight, inputs["target_ids"], temperature=0.7)

    assert torch.autograd.gradcheck(value, (inputs["hidden"].requires_grad_(), inputs["weight"].requires_grad_()))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("hidden_size", "vocab_size"), [(128, 43), (128, 64), (16, 17), (8, 5), (64, 1000)])
def test_a_row_has_the_same_bits_in_any_batch(hidden_size: int, vocab_size: int, dtype: torch.dtype):
    inputs = make_inputs(NUM_ROWS, hidden_size, vocab_size, dtype)
    assert_rows_keep_their_bits(lambda start, end: linear_logprob(
        inputs["hidden"][start:end], inputs["weight"], inputs["target_ids"][start:end], temperature=0.7),
        rows=(1, 65) if IS_INTERPRETED else ROWS)


@pytest.mark.skipif(IS_INTERPRETED, reason="torch's sums, not the kernel's; a whole minute")
def test_a_large_vocabularys_sum_is_not_split_over_threads_for_a_lone_row():
    """torch splits a sum of more than 32,768 terms with one result over threads; then the bits of a single row
    would depend on the number of threads."""
    inputs = make_inputs(3, 8, 40_000, F32)
    torch.set_num_threads(1)
    whole = linear_logprob(**inputs)
    for threads in THREADS:
        torch.set_num_threads(threads)
        for row in range(3):
            alone = linear_logprob(inputs["hidden"][row : row + 1], inputs["weight"], inputs["target_ids"][row : row + 1])
            assert all(same_bits(a, b[row : row + 1]) for a, b in zip(alone, whole, strict=True))


@pytest.mark.parametrize("order", [1, -1])
def test_chunks_whose_logits_are_far_apart_are_merged_without_loss(order: int):
    """A chunk of far smaller logits adds nothing to sum and entropy, in either order; an equal one counts in full."""
    logits = torch.cat([torch.full((1024,), -1e4), torch.full((1024,), -1e30), torch.zeros(4)][::order])
    near = torch.cat([torch.zeros(1024), torch.full((1024,), -2.0), torch.full((2,), 1.0)][::order])
    for z in (logits, near):
        inputs = (torch.ones(1, 1), z[:, None].contiguous(), torch.tensor([2050 if order > 0 else 0]).clamp(max=len(z) - 1))
        exact = definition(*(x.double() if x.is_floating_point() else x for x in inputs))
        for got, want in zip(linear_logprob(*inputs), exact, strict=True):
            torch.testing.assert_close(got.double(), want, rtol=5e-7, atol=0)  # 4 roundings of f32


@pytest.mark.parametrize("shape", [(40, 24, 50), (17, 9, 1100)], ids=str)
def test_a_master_weight_is_rounded_where_it_is_used_and_gets_its_gradient_unrounded(shape: tuple[int, int, int]):
    inputs = make_inputs(*shape, BF16)
    hidden, ids = inputs["hidden"], inputs["target_ids"]
    master = make_inputs(*shape, F32)["weight"]
    ours = values_and_gradients(lambda h, w: linear_logprob(h, w, ids), [hidden, master])
    rounded = values_and_gradients(lambda h, w: linear_logprob(h, w, ids), [hidden, master.bfloat16()])
    assert all(same_bits(a, b) for a, b in zip(ours[:3], rounded[:3], strict=True))
    assert ours[3].dtype == F32 and same_bits(ours[3].bfloat16(), rounded[3])
    for got, want in zip(ours[:2], linear_logprob(hidden, master, ids, impl="reference"), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=2e-6)  # f32 sums in another order, values up to 10


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 47), (47, 47, 123), (123, 3, 65)], ids=str)
def test_odd_sizes_are_no_worse_than_log_softmax(shape: tuple[int, int, int]):
    assert_no_worse_than_plain(linear_logprob, definition, definition, list(make_inputs(*shape, F32).values()))


def test_a_vocabulary_of_151936_and_its_gradients():
    hidden, weight, ids = make_inputs(3, 8, 151_936, BF16).values()
    for got, want in zip(linear_logprob(hidden, weight, ids), definition(hidden.double(), weight.double(), ids), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=3e-6)  # 3 ulp of 12
    if not IS_INTERPRETED:  # a minute there
        assert_no_worse_than_plain(linear_logprob, definition, definition, [hidden, weight, ids])


def test_more_rows_than_65536_and_each_as_alone():
    hidden, weight, ids = make_inputs(65_541, 2, 3, F32).values()
    whole = linear_logprob(hidden, weight, ids)
    for got, want in zip(linear_logprob(hidden[-4:], weight, ids[-4:]), whole, strict=True):
        assert same_bits(got, want[-4:])


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_gradients_have_the_same_bits_in_every_run(dtype: torch.dtype):
    inputs = list(make_inputs(140, 24, 70, dtype).values())
    assert all(map(same_bits, values_and_gradients(linear_logprob, inputs), values_and_gradients(linear_logprob, inputs)))


@pytest.mark.parametrize("bad", [-1, 12, 1 << 32])
def test_a_target_that_is_no_token_shows_as_nan_in_its_row_alone(
    bad: int, implementation: str, monkeypatch: pytest.MonkeyPatch
):
    if implementation != "triton":
        pytest.skip("the CPU raises")
    monkeypatch.setattr(torch, "empty", torch.zeros)  # the poison would be NaN already
    inputs = make_inputs(9, 8, 12, F32)
    clean = linear_logprob(**inputs)
    inputs["target_ids"][5] = bad
    logprob, entropy = linear_logprob(**inputs)
    others = torch.arange(9) != 5
    assert logprob[5].isnan() and same_bits(logprob[others], clean[0][others]) and same_bits(entropy, clean[1])


def test_broken_logits_show_in_their_own_row():
    inputs = make_inputs(40, 6, 30, F32)
    clean = linear_logprob(**inputs)
    inputs["hidden"][7, 2] = torch.inf
    for got, want in zip(linear_logprob(**inputs), clean, strict=True):
        assert got[7].isnan() and same_bits(got[torch.arange(40) != 7], want[torch.arange(40) != 7])


@pytest.mark.parametrize(("budget", "dtype"), [(0, F32), (0, BF16), (1 << 30, BF16)], ids=["f32", "recomputed", "kept"])
def test_chunks_of_the_backward_pass_and_a_kept_softmax_keep_the_error(
    budget: int, dtype: torch.dtype, implementation: str, monkeypatch: pytest.MonkeyPatch
):
    """Three chunks of the vocabulary, two blocks of rows; more than 1024 tokens, as fewer keep no softmax."""
    if implementation != "triton":
        pytest.skip("the Triton kernels alone have a budget")
    from kernels.linear_logprob import triton_kernel

    inputs = list(make_inputs(140, 24, 1100, dtype).values())
    whole = values_and_gradients(linear_logprob, inputs)
    monkeypatch.setattr(function, "SOFTMAX_BYTES", budget)
    monkeypatch.setattr(triton_kernel, "VOCAB_CHUNK", 512)
    monkeypatch.setattr(triton_kernel, "DLOGITS_BYTES", 128 * 512 * dtype.itemsize)
    assert_no_worse_than_plain(linear_logprob, definition, definition, inputs)
    assert all(map(same_bits, values_and_gradients(linear_logprob, inputs)[:2], whole[:2]))


def test_it_compiles_whole():
    inputs = make_inputs(9, 8, 12, F32)
    compiled = torch.compile(lambda h, w: linear_logprob(h, w, inputs["target_ids"]), fullgraph=True, backend="aot_eager")
    pair = [inputs["hidden"], inputs["weight"]]
    eager = values_and_gradients(lambda h, w: linear_logprob(h, w, inputs["target_ids"]), pair)
    assert all(same_bits(a, b) for a, b in zip(values_and_gradients(compiled, pair), eager, strict=True))


@pytest.mark.gpu
def test_a_gpus_memory_stays_below_that_of_the_logits(implementation: str, monkeypatch: pytest.MonkeyPatch):
    """f32 logits would be 2 GiB. Forward: 1.5 KB a row for the chunks' sums. Backward: dlogits of 128 MiB, and dweight twice."""
    if implementation != "triton":
        pytest.skip("the Triton kernels'")
    hidden, weight, ids = make_inputs(4096, 256, 131_072, BF16, "cuda").values()
    monkeypatch.setattr(function, "SOFTMAX_BYTES", 0)
    for is_wanted, limit in ((False, 64 << 20), (True, 640 << 20)):
        leaves = [x.detach().requires_grad_(is_wanted) for x in (hidden, weight)]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        logprob, entropy = linear_logprob(*leaves, ids)
        if is_wanted:
            torch.autograd.grad(logprob.sum() + entropy.sum(), leaves)
        assert torch.cuda.max_memory_allocated() - before < limit


def test_no_rows_give_no_results_and_zero_gradients():
    inputs = make_inputs(0, 4, 7, F32)
    weight = inputs["weight"].requires_grad_()
    logprob, entropy = linear_logprob(**inputs)
    assert logprob.shape == entropy.shape == (0,)
    (logprob.sum() + entropy.sum()).backward()
    assert weight.grad is not None and not weight.grad.any()


def test_wrong_arguments_raise_with_expected_and_actual():
    hidden, weight, targets = make_inputs(3, 4, 7, F32).values()
    with pytest.raises(ValueError, match=r"linear_logprob: hidden must be .*\[N, D\], got f32\[4\] on cpu"):
        linear_logprob(hidden[0], weight, targets)
    with pytest.raises(ValueError, match=r"linear_logprob: weight must be f32\[V, 4\], got f32\[4, 7\] on cpu"):
        linear_logprob(hidden, weight.T, targets)
    with pytest.raises(ValueError, match=r"linear_logprob: weight must be f32\[V, 4\], got bf16\[7, 4\] on cpu"):
        linear_logprob(hidden, weight.bfloat16(), targets)
    with pytest.raises(ValueError, match=r"linear_logprob: target_ids must be i64\[3\], got i32\[3\] on cpu"):
        linear_logprob(hidden, weight, targets.int())
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=f"linear_logprob: temperature must be above 0, got {temperature}"):
            linear_logprob(hidden, weight, targets, temperature)
