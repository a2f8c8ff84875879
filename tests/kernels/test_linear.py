"""linear against float64, and the claim it exists for: a row's bits do not depend on the rows beside it."""

from __future__ import annotations

import pytest
import torch

from kernels.linear import OP, linear, make_inputs
from tests.kernels.compare import NUM_ROWS, assert_no_worse_than_plain, assert_rows_keep_their_bits
from tests.kernels.implementations import each_implementation

implementation = each_implementation(OP)

F32, BF16 = torch.float32, torch.bfloat16
# (N, K): the default model's qkv, out, router, expert and head; then odd ones, narrow ones, and long sums.
WEIGHTS = [(256, 128), (128, 128), (8, 128), (192, 128), (128, 96), (43, 128),
           (50, 33), (2, 16), (8, 8), (16, 8), (77, 100), (128, 2048)]
# (M, N, K). A few rows by a long sum are left out: for one row torch calls a matrix-vector product, which keeps many partial
# sums and so errs less than any matrix product does, in an order that no batch shares.
SHAPES = [(1, 64, 24), (5, 50, 33), (16, 8, 16), (17, 96, 128), (100, 43, 64), (3, 1, 7), (4, 9, 1)]


def plain(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x @ weight.T


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_and_gradients_are_no_worse_than_a_plain_product(shape: tuple[int, int, int], dtype: torch.dtype):
    inputs = make_inputs(*shape, dtype)
    assert_no_worse_than_plain(linear, plain, plain, [inputs["x"], inputs["weight"]])


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("size", WEIGHTS, ids=str)
def test_a_row_has_the_same_bits_in_any_batch(size: tuple[int, int], dtype: torch.dtype):
    inputs = make_inputs(NUM_ROWS, *size, dtype)
    assert_rows_keep_their_bits(lambda start, end: linear(inputs["x"][start:end], inputs["weight"]))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_every_small_batch_keeps_the_bits(dtype: torch.dtype):
    inputs = make_inputs(40, 128, 128, dtype)
    assert_rows_keep_their_bits(lambda start, end: linear(inputs["x"][start:end], inputs["weight"]), 40, range(1, 40))


@pytest.mark.parametrize("num_rows", [2, 20])
def test_a_broken_row_breaks_no_other(num_rows: int):
    inputs = make_inputs(num_rows, 24, 40, F32)
    clean = linear(**inputs)
    inputs["x"][1] = torch.nan
    broken = linear(**inputs)
    assert broken[1].isnan().all()
    assert torch.equal(torch.cat((broken[:1], broken[2:])), torch.cat((clean[:1], clean[2:])))


def test_no_rows_give_no_rows_and_zero_gradients():
    inputs = make_inputs(0, 5, 7, F32)
    weight = inputs["weight"].requires_grad_()
    out = linear(inputs["x"], weight)
    assert out.shape == (0, 5)
    out.sum().backward()
    assert weight.grad is not None and torch.equal(weight.grad, torch.zeros(5, 7))


def test_wrong_arguments_are_named_with_what_was_expected_and_what_came():
    x, weight = make_inputs(3, 5, 7, F32).values()
    with pytest.raises(ValueError, match=r"linear: x must be .*\[M, K\], got f32\[3, 7, 1\] on cpu"):
        linear(x[..., None], weight)
    with pytest.raises(ValueError, match=r"linear: weight must be f32\[N, 7\], got f32\[7, 5\] on cpu"):
        linear(x, weight.T)
    with pytest.raises(ValueError, match=r"linear: weight must be f32\[N, 7\], got bf16\[5, 7\] on cpu"):
        linear(x, weight.bfloat16())
    with pytest.raises(ValueError, match=r"linear: x must be .*, got i64\[3, 7\] on cpu"):
        linear(x.long(), weight)
    with pytest.raises(ValueError, match=r"linear: x must be .*, got list"):
        linear([1.0], weight)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"linear: impl must be one of .*'reference'.*, got 'cublas'"):
        linear(x, weight, impl="cublas")
