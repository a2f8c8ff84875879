"""rms_norm: float64 accuracy, gradients, and bits that do not depend on a row's place in the batch."""

from __future__ import annotations

import pytest
import torch

from kernels.rms_norm import OP, make_inputs, rms_norm
from tests.kernels.compare import NUM_ROWS, assert_no_worse_than_plain, assert_rows_keep_their_bits
from tests.kernels.implementations import each_implementation

implementation = each_implementation(OP)

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
DTYPES = [F32, BF16]
# Below, at and past a vector register (16 f32 lanes), the model's widths, and one past each: where a loop's tail begins.
WIDTHS = [1, 3, 8, 15, 16, 17, 32, 33, 96, 128, 129, 200]


def plain_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * weight.to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 128), (9, 96), (3, 4, 32), (7, 1), (0, 16), (2, 0, 8)], ids=str)
def test_rms_norm_is_no_worse_than_plain(shape: tuple[int, ...], dtype: torch.dtype):
    inputs = make_inputs(shape, dtype)
    assert_no_worse_than_plain(rms_norm, plain_norm, plain_norm, [inputs["x"], inputs["weight"]])


def test_bf16_results_are_rounded_once():
    """Within half a step of the exact value; one more rounding on the way would go beyond it."""
    inputs = make_inputs((50, 64), BF16)
    got, exact = rms_norm(**inputs), plain_norm(inputs["x"].double(), inputs["weight"].double())
    half_step = torch.exp2(exact.abs().log2().floor()) * torch.finfo(BF16).eps / 2
    assert ((got.double() - exact).abs() <= 1.001 * half_step).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm_gives_a_row_the_same_bits_in_any_batch(width: int, dtype: torch.dtype):
    inputs = make_inputs((NUM_ROWS, width), dtype)
    assert_rows_keep_their_bits(lambda start, end: rms_norm(inputs["x"][start:end], inputs["weight"]))


def test_rms_norm_follows_its_formula_on_a_row_done_by_hand():
    x, weight = torch.tensor([[3.0, -4.0]]), torch.tensor([2.0, 0.5])
    # mean(x^2) = 12.5, and eps makes it 16: y = x / 4 * weight, exact in binary
    assert rms_norm(x, weight, eps=3.5).tolist() == [[1.5, -0.5]]
    assert rms_norm(torch.zeros(2, 4), torch.ones(4)).eq(0).all()


def test_results_keep_the_inputs_dtype():
    for dtype in (F32, BF16, F64, torch.float16):
        assert rms_norm(**make_inputs((2, 8), dtype)).dtype == dtype


def test_wrong_arguments_are_named_with_what_was_expected_and_what_came():
    with pytest.raises(ValueError, match=r"rms_norm: x must be float\[\.\.\., D\], got i64\[2, 4\] on cpu"):
        rms_norm(torch.zeros(2, 4, dtype=torch.int64), torch.ones(4))
    with pytest.raises(ValueError, match=r"rms_norm: weight must be f32\|f64\[4\], got f32\[3\] on cpu"):
        rms_norm(torch.zeros(2, 4), torch.ones(3))
    with pytest.raises(ValueError, match=r"rms_norm: weight must be f32\|f64\[4\], got bf16\[4\] on cpu"):
        rms_norm(torch.zeros(2, 4), torch.ones(4, dtype=BF16))
