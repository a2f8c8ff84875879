"""linear against float64, and its purpose: a row's bits do not depend on the other rows of the batch."""

from __future__ import annotations

import mmap

import pytest
import torch

from kernels.linear import OP, linear, make_inputs
from kernels.triton_ops import IS_INTERPRETED
from tests.kernels.compare import NUM_ROWS, assert_no_worse_than_plain, assert_rows_keep_their_bits, same_bits, values_and_gradients
from tests.kernels.implementations import each_implementation

implementation = each_implementation(OP)

F32, BF16 = torch.float32, torch.bfloat16
# (N, K): the default model's qkv, out, router, expert and head; then odd ones, narrow ones, and long sums.
WEIGHTS = [(256, 128), (128, 128), (8, 128), (192, 128), (128, 96), (43, 128),
           (50, 33), (2, 16), (8, 8), (16, 8), (77, 100), (128, 2048)]
# (M, N, K). Few rows with a long sum are left out: for one row torch calls a matrix-vector product, whose many
# partial sums give a smaller error than any matrix product, in an order that no larger batch has.
SHAPES = [(1, 64, 24), (5, 50, 33), (16, 8, 16), (17, 96, 128), (100, 43, 64), (3, 1, 7), (4, 9, 1), (47, 123, 47)]


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
    every = range(1, 40, 12 if IS_INTERPRETED else 1)
    assert_rows_keep_their_bits(lambda start, end: linear(inputs["x"][start:end], inputs["weight"]), 40, every)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_weight_gradient_over_many_rows_is_right_and_the_same_in_every_run(dtype: torch.dtype):
    """More rows than one GPU program should sum: they are split, and the partial sums are added in order."""
    inputs = list(make_inputs(1100, 24, 40, dtype).values())
    assert_no_worse_than_plain(linear, plain, plain, inputs)
    assert all(map(same_bits, values_and_gradients(linear, inputs), values_and_gradients(linear, inputs)))


def test_a_wide_weight_has_the_same_error_and_its_rows_their_bits():
    """2048 columns of 1024 terms: a GPU's largest tile."""
    inputs = make_inputs(140, 2048, 1024, BF16)
    got, want = linear(**inputs), plain(inputs["x"].double(), inputs["weight"].double())
    assert float((got.double() - want).abs().max()) <= 2**-8 * float(want.abs().max())  # one rounding to bf16
    assert same_bits(linear(inputs["x"][133:], inputs["weight"]), got[133:])


@pytest.mark.skipif(not IS_INTERPRETED, reason="calls the Triton launcher, on memory that is reserved and never touched")
def test_rows_that_begin_beyond_two_to_the_31_are_found():
    from kernels.linear.triton_kernel import config, gemm

    far = (1 << 30) + 64  # fits 32 bits, twice it does not
    x, out = (torch.frombuffer(mmap.mmap(-1, 4 * (2 * far + 16)), dtype=F32).as_strided((3, 16), (far, 1)) for _ in range(2))
    weight = torch.randn(16, 16)
    x[:] = torch.randn(3, 16)
    gemm(out, x, weight, config(F32, 16, 16))
    torch.testing.assert_close(out, x @ weight)


def test_it_compiles_whole():
    inputs = list(make_inputs(9, 8, 12, F32).values())
    compiled = torch.compile(lambda x, weight: linear(x, weight), fullgraph=True, backend="aot_eager")
    assert all(map(same_bits, values_and_gradients(compiled, inputs), values_and_gradients(linear, inputs)))


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


def test_wrong_arguments_raise_with_expected_and_actual():
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
