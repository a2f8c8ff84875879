"""swiglu: float64 accuracy, gradients, and bits that do not depend on a row's index in the batch."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from kernels.native import ISA, OPS
from kernels.swiglu import OP, make_inputs, swiglu
from kernels.triton_ops import IS_INTERPRETED
from tests.kernels.compare import NUM_ROWS, assert_no_worse_than_plain, assert_rows_keep_their_bits, same_bits
from tests.kernels.implementations import each_implementation

implementation = each_implementation(OP)

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
DTYPES = [F32, BF16]
needs_native = pytest.mark.skipif(not ISA, reason="needs the native library")
# Below, at and above a vector register (16 f32 lanes), the model's widths, and one more than each, for a loop's tail.
WIDTHS = [1, 33, 96] if IS_INTERPRETED else [1, 3, 8, 15, 16, 17, 32, 33, 96, 128, 129, 200]


def plain_swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    half = gate_up.shape[1] // 2
    return F.silu(gate_up[:, :half]) * gate_up[:, half:]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 96), (9, 33), (40, 1), (0, 8), (123, 47)], ids=str)
def test_swiglu_is_no_worse_than_plain(shape: tuple[int, int], dtype: torch.dtype):
    assert_no_worse_than_plain(swiglu, plain_swiglu, plain_swiglu, [3 * make_inputs(*shape, dtype)["gate_up"]])


def test_bf16_results_are_rounded_once():
    """Within half a step of the exact value; a second rounding would exceed it."""
    gate_up = 3 * make_inputs(50, 64, BF16)["gate_up"]
    got, exact = swiglu(gate_up), plain_swiglu(gate_up.double())
    half_step = torch.exp2(exact.abs().log2().floor()) * torch.finfo(BF16).eps / 2
    # 1e-6: for a result near 0 the f32 rounding of silu itself counts.
    assert ((got.double() - exact).abs() <= 1.001 * half_step + 1e-6).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_swiglu_gives_a_row_the_same_bits_in_any_batch(width: int, dtype: torch.dtype):
    gate_up = 3 * make_inputs(NUM_ROWS, width, dtype)["gate_up"]
    assert_rows_keep_their_bits(lambda start, end: swiglu(gate_up[start:end]))


@pytest.mark.parametrize("dtype", [*DTYPES, F64])
def test_swiglu_and_its_gradient_stay_finite_at_the_far_ends(dtype: torch.dtype):
    gate = torch.tensor([-1e4, -100.0, -88.0, 0.0, 88.0, 1e4], dtype=dtype)
    gate_up = torch.stack((gate, torch.full_like(gate, 2.0)), dim=1).requires_grad_()
    out = swiglu(gate_up)
    out.sum().backward()
    assert gate_up.grad is not None and gate_up.grad.isfinite().all()
    # silu(-88) is -5e-37: negligible against 1, in any of these types
    torch.testing.assert_close(out[:, 0], 2 * gate.clamp(min=0), rtol=0, atol=1e-30)


def test_many_rows_in_one_batch_and_rows_wider_than_a_tile():
    """More than 65,536 rows, which some grids cannot hold."""
    many, wide = make_inputs(66_000, 1, F32)["gate_up"], make_inputs(3, 2500, F32)["gate_up"]
    assert same_bits(swiglu(many)[-3:], swiglu(many[-3:]))
    assert_no_worse_than_plain(swiglu, plain_swiglu, plain_swiglu, [wide])


def test_results_keep_the_inputs_dtype():
    for dtype in (F32, BF16, F64, torch.float16):
        assert swiglu(**make_inputs(2, 8, dtype)).dtype == dtype


def test_wrong_arguments_raise_with_expected_and_actual():
    with pytest.raises(ValueError, match=r"swiglu: gate_up must be .*\[T, 2I\], got f32\[4\] on cpu"):
        swiglu(torch.zeros(4))
    with pytest.raises(ValueError, match=r"swiglu: gate_up must hold two halves of equal width, got width 5"):
        swiglu(torch.zeros(2, 5))


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_native_gradient_has_the_same_bits_with_two_threads_and_covers_its_output(dtype: torch.dtype):
    gate_up, dy = make_inputs(600, 33, dtype)["gate_up"], make_inputs(600, 33, dtype, seed=1)["gate_up"][:, :33].contiguous()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(torch.full_like(gate_up, torch.nan))
        OPS.swiglu_bwd(results[-1], dy, gate_up)
    assert same_bits(*results) and not results[0].isnan().any()


@pytest.mark.parametrize("impl", ["triton"] if IS_INTERPRETED else [pytest.param("native", marks=needs_native)])
def test_the_op_compiles_without_a_graph_break(impl: str):
    gate_up = make_inputs(5, 8, F32)["gate_up"].requires_grad_()
    out = torch.compile(partial(swiglu, impl=impl), fullgraph=True, backend="aot_eager")(gate_up)
    assert same_bits(out, swiglu(gate_up, impl))
    assert torch.autograd.grad(out.sum(), gate_up)[0].isfinite().all()


@needs_native
def test_bad_tensors_given_straight_to_the_native_op_raise():
    gate_up, y = torch.zeros(3, 8), torch.zeros(3, 4)
    for arguments, message in [
        ((y, gate_up[:, :7].contiguous()), r"gate_up must be f32\[3, 8\] .*got f32\[3, 7\]"),
        ((y, gate_up.T.contiguous().T), r"gate_up must be .*not contiguous"),
        ((y[0], gate_up), r"y must have 2 dimensions, got 1"),
        ((y.bfloat16(), gate_up), r"y must be f32\[3, 4\] .*got bf16"),
        ((y, gate_up.double()), r"gate_up must be f32 or bf16"),
    ]:
        with pytest.raises(RuntimeError, match=f"swiglu_fwd: {message}"):
            OPS.swiglu_fwd(*arguments)
    with pytest.raises(RuntimeError, match=r"swiglu_bwd: dgate_up must be f32\[3, 8\]"):
        OPS.swiglu_bwd(torch.zeros(2, 8), y, gate_up)
