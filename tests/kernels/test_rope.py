"""rope: float64 accuracy, gradients, and bits that do not depend on a row's index in the batch or x's strides."""

from __future__ import annotations

import pytest
import torch

from kernels.rms_norm import make_inputs as norm_inputs
from kernels.rms_norm import rms_norm
from kernels.rope import OP, make_inputs, rope
from tests.kernels.compare import NUM_ROWS, assert_no_worse_than_plain, assert_rows_keep_their_bits, same_bits
from tests.kernels.implementations import each_implementation

implementation = each_implementation(OP)

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
DTYPES = [F32, BF16]


def plain_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """By complex numbers: the pair (x[c], x[c + C/2]) times e^(i angle)."""
    half = x.shape[-1] // 2
    cos, sin = cos.to(x.dtype)[:, None], sin.to(x.dtype)[:, None]
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 2), (9, 4, 32), (30, 3, 6), (0, 2, 8)], ids=str)
def test_rope_is_no_worse_than_plain(shape: tuple[int, int, int], dtype: torch.dtype):
    inputs = make_inputs(*shape, dtype)
    # The tables are constants: their gradients would be sums over heads that no parameter uses.
    op, plain, exact = (
        lambda x, f=f, dt=dt: f(x, inputs["cos"].to(dt), inputs["sin"].to(dt))
        for f, dt in ((rope, F32), (plain_rope, F32), (plain_rope, F64))
    )
    assert_no_worse_than_plain(op, plain, exact, [inputs["x"]])


def test_bf16_results_are_rounded_once():
    """Within half a step of the exact value; a second rounding would exceed it."""
    inputs = make_inputs(50, 2, 16, BF16)
    got, exact = rope(**inputs), plain_rope(**{name: tensor.double() for name, tensor in inputs.items()})
    half_step = torch.exp2(exact.abs().log2().floor()) * torch.finfo(BF16).eps / 2
    # The difference of two products may cancel: the f32 rounding of its terms then exceeds the result's half step.
    assert ((got.double() - exact).abs() <= 1.001 * half_step + 1e-6).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(1, 1, 8), (4, 2, 32), (3, 3, 6)], ids=str)
def test_heads_cut_from_a_fused_projection_keep_their_bits(heads: tuple[int, int, int], dtype: torch.dtype):
    """q and k are strided views of one matrix, as in the model: normed, then rotated."""
    num_heads, num_kv_heads, head_dim = heads
    x = norm_inputs((NUM_ROWS, num_heads + 2 * num_kv_heads, head_dim), dtype)
    table = make_inputs(NUM_ROWS, 1, head_dim, dtype)

    def cut(start: int, end: int) -> tuple[torch.Tensor, ...]:
        q, k, _ = x["x"][start:end].split((num_heads, num_kv_heads, num_kv_heads), dim=1)
        cos, sin = table["cos"][start:end], table["sin"][start:end]
        return tuple(rope(rms_norm(part, x["weight"]), cos, sin) for part in (q, k))

    assert_rows_keep_their_bits(cut)


def test_rope_turns_pairs_and_leaves_position_zero_alone():
    x = torch.tensor([[[1.0, 10.0, 2.0, 20.0]], [[1.0, 10.0, 2.0, 20.0]]])  # pairs (1, 2) and (10, 20)
    cos, sin = torch.tensor([[1.0, 1.0], [0.0, -1.0]]), torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    # row 1: the first pair by 90 degrees, the second by 180
    assert rope(x, cos, sin).tolist() == [[[1.0, 10.0, 2.0, 20.0]], [[-2.0, -10.0, 1.0, -20.0]]]


def test_many_rows_in_one_batch():
    """More than 65,536, which some grids cannot hold."""
    x, cos, sin = make_inputs(33_000, 2, 2, F32).values()
    assert same_bits(rope(x, cos, sin)[-3:], rope(x[-3:], cos[-3:], sin[-3:]))


def test_results_keep_the_inputs_dtype():
    for dtype in (F32, BF16, F64, torch.float16):
        assert rope(**make_inputs(2, 1, 8, dtype)).dtype == dtype


def test_wrong_arguments_raise_with_expected_and_actual():
    x, cos, sin = make_inputs(3, 2, 8, F32).values()
    with pytest.raises(ValueError, match=r"rope: x must be .*\[T, H, C\], got f32\[3, 8\] on cpu"):
        rope(x[:, 0], cos, sin)
    with pytest.raises(ValueError, match=r"rope: the head dim of x must be even, got 7"):
        rope(x[..., :7], cos, sin)
    with pytest.raises(ValueError, match=r"rope: cos must be f32\|f64\[3, 4\], got f32\[2, 4\] on cpu"):
        rope(x, cos[:2], sin)
    with pytest.raises(ValueError, match=r"rope: sin must be f32\|f64\[3, 4\], got f32\[3, 3\] on cpu"):
        rope(x, cos, sin[:, :3])
