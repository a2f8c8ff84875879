"""rms_norm, rope and swiglu: float64 accuracy, gradients, and bits that do not depend on a row's place in the batch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kernels.rms_norm import make_inputs as norm_inputs
from kernels.rms_norm import rms_norm
from kernels.rope import make_inputs as rope_inputs
from kernels.rope import rope
from kernels.swiglu import make_inputs as swiglu_inputs
from kernels.swiglu import swiglu
from tests.kernels.compare import NUM_ROWS, assert_no_worse_than_plain, assert_rows_keep_their_bits

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
DTYPES = [F32, BF16]
# Below, at and past a vector register (16 f32 lanes), the model's widths, and one past each: where a loop's tail begins.
WIDTHS = [1, 3, 8, 15, 16, 17, 32, 33, 96, 128, 129, 200]


def plain_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * weight.to(x.dtype)


def plain_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """As complex numbers would turn, pair by pair: (x[c], x[c + C/2]) -> e^(i angle) times it."""
    half = x.shape[-1] // 2
    cos, sin = cos.to(x.dtype)[:, None], sin.to(x.dtype)[:, None]
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


def plain_swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    half = gate_up.shape[1] // 2
    return F.silu(gate_up[:, :half]) * gate_up[:, half:]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 128), (9, 96), (3, 4, 32), (7, 1), (0, 16), (2, 0, 8)], ids=str)
def test_rms_norm_is_no_worse_than_plain(shape: tuple[int, ...], dtype: torch.dtype):
    inputs = norm_inputs(shape, dtype)
    assert_no_worse_than_plain(rms_norm, plain_norm, plain_norm, [inputs["x"], inputs["weight"]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 2), (9, 4, 32), (30, 3, 6), (0, 2, 8)], ids=str)
def test_rope_is_no_worse_than_plain(shape: tuple[int, int, int], dtype: torch.dtype):
    inputs = rope_inputs(*shape, dtype)
    # The tables are facts, not weights: their gradients are summed over heads and belong to no one.
    op, plain, exact = (
        lambda x, f=f, dt=dt: f(x, inputs["cos"].to(dt), inputs["sin"].to(dt))
        for f, dt in ((rope, F32), (plain_rope, F32), (plain_rope, F64))
    )
    assert_no_worse_than_plain(op, plain, exact, [inputs["x"]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 96), (9, 33), (40, 1), (0, 8)], ids=str)
def test_swiglu_is_no_worse_than_plain(shape: tuple[int, int], dtype: torch.dtype):
    assert_no_worse_than_plain(swiglu, plain_swiglu, plain_swiglu, [3 * swiglu_inputs(*shape, dtype)["gate_up"]])


def test_bf16_results_are_rounded_once():
    """Within half a step of the exact value; one more rounding on the way would go beyond it."""
    norm, table, fused = norm_inputs((50, 64), BF16), rope_inputs(50, 2, 16, BF16), 3 * swiglu_inputs(50, 64, BF16)["gate_up"]
    wide = {name: tensor.double() for name, tensor in table.items()}
    for got, exact in [
        (rms_norm(**norm), plain_norm(norm["x"].double(), norm["weight"].double())),
        (rope(**table), plain_rope(**wide)), (swiglu(fused), plain_swiglu(fused.double())),
    ]:
        half_step = torch.exp2(exact.abs().log2().floor()) * torch.finfo(BF16).eps / 2
        # rope's difference of two products may cancel: an f32 rounding of its terms is then more than the result's half step
        assert ((got.double() - exact).abs() <= 1.001 * half_step + 1e-6).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm_gives_a_row_the_same_bits_in_any_batch(width: int, dtype: torch.dtype):
    inputs = norm_inputs((NUM_ROWS, width), dtype)
    assert_rows_keep_their_bits(lambda start, end: rms_norm(inputs["x"][start:end], inputs["weight"]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(1, 1, 8), (4, 2, 32), (3, 3, 6)], ids=str)
def test_heads_cut_from_a_fused_projection_keep_their_bits(heads: tuple[int, int, int], dtype: torch.dtype):
    """q and k are strided views of one matrix, as the model cuts them: normed, then turned."""
    num_heads, num_kv_heads, head_dim = heads
    x = norm_inputs((NUM_ROWS, num_heads + 2 * num_kv_heads, head_dim), dtype)
    table = rope_inputs(NUM_ROWS, 1, head_dim, dtype)

    def cut(start: int, end: int) -> tuple[torch.Tensor, ...]:
        q, k, _ = x["x"][start:end].split((num_heads, num_kv_heads, num_kv_heads), dim=1)
        cos, sin = table["cos"][start:end], table["sin"][start:end]
        return tuple(rope(rms_norm(part, x["weight"]), cos, sin) for part in (q, k))

    assert_rows_keep_their_bits(cut)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_swiglu_gives_a_row_the_same_bits_in_any_batch(width: int, dtype: torch.dtype):
    gate_up = 3 * swiglu_inputs(NUM_ROWS, width, dtype)["gate_up"]
    assert_rows_keep_their_bits(lambda start, end: swiglu(gate_up[start:end]))


def test_rms_norm_follows_its_formula_on_a_row_done_by_hand():
    x, weight = torch.tensor([[3.0, -4.0]]), torch.tensor([2.0, 0.5])
    # mean(x^2) = 12.5, and eps makes it 16: y = x / 4 * weight, exact in binary
    assert rms_norm(x, weight, eps=3.5).tolist() == [[1.5, -0.5]]
    assert rms_norm(torch.zeros(2, 4), torch.ones(4)).eq(0).all()


def test_rope_turns_pairs_and_leaves_position_zero_alone():
    x = torch.tensor([[[1.0, 10.0, 2.0, 20.0]], [[1.0, 10.0, 2.0, 20.0]]])  # pairs (1, 2) and (10, 20)
    cos, sin = torch.tensor([[1.0, 1.0], [0.0, -1.0]]), torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    # row 1: the first pair by 90 degrees, the second by 180
    assert rope(x, cos, sin).tolist() == [[[1.0, 10.0, 2.0, 20.0]], [[-2.0, -10.0, 1.0, -20.0]]]


@pytest.mark.parametrize("dtype", [F32, BF16, F64])
def test_swiglu_and_its_gradient_stay_finite_at_the_far_ends(dtype: torch.dtype):
    gate = torch.tensor([-1e4, -100.0, -88.0, 0.0, 88.0, 1e4], dtype=dtype)
    gate_up = torch.stack((gate, torch.full_like(gate, 2.0)), dim=1).requires_grad_()
    out = swiglu(gate_up)
    out.sum().backward()
    assert gate_up.grad is not None and gate_up.grad.isfinite().all()
    # silu(-88) is -5e-37: nothing beside 1, in any of these types
    torch.testing.assert_close(out[:, 0], 2 * gate.clamp(min=0), rtol=0, atol=1e-30)


def test_results_keep_the_inputs_dtype():
    for dtype in (F32, BF16, F64, torch.float16):
        assert rms_norm(**norm_inputs((2, 8), dtype)).dtype == dtype
        assert rope(**rope_inputs(2, 1, 8, dtype)).dtype == dtype
        assert swiglu(**swiglu_inputs(2, 8, dtype)).dtype == dtype


def test_wrong_arguments_are_named_with_what_was_expected_and_what_came():
    with pytest.raises(ValueError, match=r"rms_norm: x must be float\[\.\.\., D\], got i64\[2, 4\] on cpu"):
        rms_norm(torch.zeros(2, 4, dtype=torch.int64), torch.ones(4))
    with pytest.raises(ValueError, match=r"rms_norm: weight must be f32\|f64\[4\], got f32\[3\] on cpu"):
        rms_norm(torch.zeros(2, 4), torch.ones(3))
    with pytest.raises(ValueError, match=r"rms_norm: weight must be f32\|f64\[4\], got bf16\[4\] on cpu"):
        rms_norm(torch.zeros(2, 4), torch.ones(4, dtype=BF16))
    x, cos, sin = rope_inputs(3, 2, 8, F32).values()
    with pytest.raises(ValueError, match=r"rope: x must be .*\[T, H, C\], got f32\[3, 8\] on cpu"):
        rope(x[:, 0], cos, sin)
    with pytest.raises(ValueError, match=r"rope: the head dim of x must be even, got 7"):
        rope(x[..., :7], cos, sin)
    with pytest.raises(ValueError, match=r"rope: cos must be f32\|f64\[3, 4\], got f32\[2, 4\] on cpu"):
        rope(x, cos[:2], sin)
    with pytest.raises(ValueError, match=r"rope: sin must be f32\|f64\[3, 4\], got f32\[3, 3\] on cpu"):
        rope(x, cos, sin[:, :3])
    with pytest.raises(ValueError, match=r"swiglu: gate_up must be .*\[T, 2I\], got f32\[4\] on cpu"):
        swiglu(torch.zeros(4))
    with pytest.raises(ValueError, match=r"swiglu: gate_up must hold two halves of equal width, got width 5"):
        swiglu(torch.zeros(2, 5))
