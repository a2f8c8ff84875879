"""rms_norm: float64 accuracy, gradients, and bits that do not depend on a row's index in the batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kernels.rms_norm import ADD_OP, OP, add_rms_norm, make_inputs, rms_norm
from kernels.rope import make_inputs as rope_inputs
from kernels.rope import rope
from kernels.triton_ops import IS_INTERPRETED
from tests.kernels.compare import (
    NUM_ROWS,
    assert_no_worse_than_plain,
    assert_rows_keep_their_bits,
    same_bits,
    values_and_gradients,
)
from tests.kernels.implementations import each_implementation

implementation = each_implementation(OP, ADD_OP)

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
DTYPES = [F32, BF16]
# Below, at and above a vector register (16 f32 lanes), the model's widths, and one more than each, for a loop's tail.
WIDTHS = [1, 33, 128] if IS_INTERPRETED else [1, 3, 8, 15, 16, 17, 32, 33, 96, 128, 129, 200]


def plain_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * weight.to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 128), (9, 96), (3, 4, 32), (7, 1), (0, 16), (2, 0, 8)], ids=str)
def test_rms_norm_is_no_worse_than_plain(shape: tuple[int, ...], dtype: torch.dtype):
    inputs = make_inputs(shape, dtype)
    assert_no_worse_than_plain(rms_norm, plain_norm, plain_norm, [inputs["x"], inputs["weight"]])


def test_bf16_results_are_rounded_once():
    """Within half a step of the exact value; a second rounding would exceed it."""
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [47, 128] if IS_INTERPRETED else [16, 32, 47, 123, 128, 2048])
def test_norm_and_gradients_of_many_rows_are_no_worse_than_plain(size: int, dtype: torch.dtype):
    """More rows than one partial sum of dweight. With fewer columns the root mean square of its error is luck."""
    inputs = make_inputs((150 if IS_INTERPRETED else 300, size), dtype)
    assert_no_worse_than_plain(rms_norm, plain_norm, plain_norm, [inputs["x"], inputs["weight"]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [slice(0, 4), slice(5, 6)], ids=str)
def test_strided_heads_have_the_bits_and_gradients_of_a_copy(heads: slice, dtype: torch.dtype):
    cut, dy = make_inputs((30, 8, 32), dtype)["x"][:, heads], make_inputs((30, 9, 32), dtype, seed=1)["x"][:, heads]
    weight = make_inputs((1, 32), F32)["weight"]
    results = []
    for x, upstream in ((cut, dy), (cut.reshape(-1, 32), dy.reshape(-1, 32))):
        leaves = [x.detach().requires_grad_(), weight.clone().requires_grad_()]
        out = rms_norm(*leaves)
        dx, dweight = torch.autograd.grad(out, leaves, upstream)
        results.append((out.reshape(-1, 32), dx.reshape(-1, 32), dweight))
    assert all(map(same_bits, *results))


def test_any_leading_shape_is_a_batch_of_rows():
    inputs = make_inputs((2, 3, 4, 5, 24), F32)
    flat = rms_norm(inputs["x"].reshape(-1, 24), inputs["weight"])
    assert same_bits(rms_norm(**inputs), flat.view(2, 3, 4, 5, 24))
    assert same_bits(rms_norm(inputs["x"][0, 0, 0, 0], inputs["weight"]), flat[0])
    assert same_bits(rms_norm(inputs["x"].transpose(0, 3), inputs["weight"]).transpose(0, 3), flat.view(2, 3, 4, 5, 24))
    assert rms_norm(torch.zeros(0, 3, 8), torch.ones(8)).shape == (0, 3, 8)


def test_far_values_follow_the_reference_and_a_broken_row_breaks_no_other():
    x = torch.tensor([[1e18, -1e18, 1.0], [1e-30, 1e-30, -1e-30], [1e20, 0.0, 0.0], [torch.nan, 1.0, 1.0], [3.0, 4.0, 5.0]])
    got, want = rms_norm(x, torch.ones(3)), rms_norm(x, torch.ones(3), impl="reference")
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0, equal_nan=True)  # a few roundings
    assert got[3].isnan().all() and got[:3].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(9, 96), (3, 4, 32), (0, 16), (2, 2049)], ids=str)
def test_the_norm_of_a_sum_is_that_of_the_sum_and_its_gradient_reaches_both(shape: tuple[int, ...], dtype: torch.dtype):
    inputs = make_inputs(shape, dtype)
    residual = make_inputs(shape, dtype, seed=1)["x"]

    def plain(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return plain_norm(x + residual, weight), x + residual

    assert_no_worse_than_plain(add_rms_norm, plain, plain, [inputs["x"], residual, inputs["weight"]])
    normed, total = add_rms_norm(inputs["x"], residual, inputs["weight"])
    assert same_bits(total, inputs["x"] + residual)
    assert same_bits(normed, rms_norm(total, inputs["weight"]))  # one pass or two: the same


def test_a_sum_of_which_one_result_is_used_has_its_gradient():
    inputs, upstream = make_inputs((5, 24), F32), make_inputs((5, 24), F32, seed=2)["x"]
    leaves = [make_inputs((5, 24), F32, seed=seed)["x"].requires_grad_() for seed in (3, 4)]
    _, total = add_rms_norm(*leaves, inputs["weight"])
    assert all(same_bits(grad, upstream) for grad in torch.autograd.grad(total, leaves, upstream))
    normed, _ = add_rms_norm(*leaves, inputs["weight"])
    alone = (leaves[0] + leaves[1]).detach().requires_grad_()
    (want,) = torch.autograd.grad(rms_norm(alone, inputs["weight"]), alone, upstream)
    assert all(same_bits(grad, want) for grad in torch.autograd.grad(normed, leaves, upstream))


@pytest.mark.parametrize("size", [24, 128])
def test_two_runs_have_the_same_bits(size: int):
    inputs = list(make_inputs((100, size), F32).values())
    assert all(map(same_bits, values_and_gradients(rms_norm, inputs), values_and_gradients(rms_norm, inputs)))


def test_many_rows_in_one_batch():
    """More than 65,536, which some grids cannot hold."""
    x, weight = make_inputs((66_000, 2), F32).values()
    got = rms_norm(x, weight)
    assert same_bits(got[-3:], rms_norm(x[-3:], weight)) and got.isfinite().all()


@pytest.mark.skipif(not IS_INTERPRETED, reason="tests the Triton kernels")
@pytest.mark.parametrize("max_parts", [1, 3])
def test_dweights_sum_is_right_however_many_rows_a_part_has(max_parts: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("kernels.rms_norm.triton_kernel.MAX_PARTS", max_parts)
    inputs = make_inputs((70, 96), F32)
    assert_no_worse_than_plain(rms_norm, plain_norm, plain_norm, [inputs["x"], inputs["weight"]])


@pytest.mark.skipif(not IS_INTERPRETED, reason="tests the Triton kernels")
def test_rows_more_than_2_to_the_31_elements_apart_are_found(tmp_path: Path):
    """In a sparse file, of which only the pages of these rows exist."""
    stride = 2**30 + 64
    storage = torch.from_file(str(tmp_path / "holes"), shared=True, size=3 * stride, dtype=BF16)
    rows = storage.as_strided((3, 2, 32), (stride, 32, 1))
    inputs = make_inputs((3, 2, 32), BF16)
    rows.copy_(inputs["x"])
    assert same_bits(rms_norm(rows, inputs["weight"]), rms_norm(inputs["x"], inputs["weight"]))
    table = rope_inputs(3, 2, 32, BF16)
    turned, want = (rope(x, table["cos"], table["sin"], impl="triton") for x in (rows, inputs["x"]))
    assert same_bits(turned, want)


@pytest.mark.skipif(not IS_INTERPRETED, reason="tests the Triton kernels")
def test_the_triton_ops_compile_without_a_graph_break():
    x, weight = make_inputs((9, 2, 8), F32).values()
    table = rope_inputs(9, 2, 8, F32)

    def layer(x: torch.Tensor) -> torch.Tensor:
        normed, total = add_rms_norm(x, rms_norm(x, weight, impl="triton"), weight, impl="triton")
        return rope(normed + total, table["cos"], table["sin"], impl="triton")

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert all(map(same_bits, values_and_gradients(compiled, [x]), values_and_gradients(layer, [x])))


def test_results_keep_the_inputs_dtype():
    for dtype in (F32, BF16, F64, torch.float16):
        assert rms_norm(**make_inputs((2, 8), dtype)).dtype == dtype


def test_wrong_arguments_raise_with_expected_and_actual():
    with pytest.raises(ValueError, match=r"rms_norm: x must be float\[\.\.\., D\], got i64\[2, 4\] on cpu"):
        rms_norm(torch.zeros(2, 4, dtype=torch.int64), torch.ones(4))
    with pytest.raises(ValueError, match=r"rms_norm: weight must be f32\|f64\[4\], got f32\[3\] on cpu"):
        rms_norm(torch.zeros(2, 4), torch.ones(3))
    with pytest.raises(ValueError, match=r"rms_norm: weight must be f32\|f64\[4\], got bf16\[4\] on cpu"):
        rms_norm(torch.zeros(2, 4), torch.ones(4, dtype=BF16))
    with pytest.raises(ValueError, match=r"add_rms_norm: residual must be f32\[2, 4\], got f32\[3, 4\] on cpu"):
        add_rms_norm(torch.zeros(2, 4), torch.zeros(3, 4), torch.ones(4))
    with pytest.raises(ValueError, match=r"add_rms_norm: x must be float\[\.\.\., D\], got i64\[2\] on cpu"):
        add_rms_norm(torch.zeros(2, dtype=torch.int64), torch.zeros(2), torch.ones(2))
