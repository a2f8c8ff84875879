"""The native rms_norm and rope: strided heads read without a copy, bits of the gradients, poisoned outputs, bad arguments."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from kernels.native import ISA, OPS
from kernels.rms_norm import make_inputs, rms_norm
from kernels.rope import make_inputs as rope_inputs
from kernels.rope import rope
from tests.kernels.compare import THREADS, same_bits, values_and_gradients

pytestmark = pytest.mark.skipif(not ISA, reason="needs the native library")
F32, BF16 = torch.float32, torch.bfloat16
norm, turn = partial(rms_norm, impl="native"), partial(rope, impl="native")


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("head_dim", [2, 6, 32, 94, 128])
def test_strided_heads_have_the_bits_and_gradients_of_a_copy(head_dim: int, dtype: torch.dtype):
    qkv = make_inputs((70, 8, head_dim), dtype)
    cos, sin = (rope_inputs(70, 1, head_dim, F32)[name] for name in ("cos", "sin"))
    for cut in (slice(0, 4), slice(5, 6)):
        strided, copied = qkv["x"][:, cut], qkv["x"][:, cut].contiguous()
        assert same_bits(norm(strided, qkv["weight"]), norm(copied, qkv["weight"]))
        assert same_bits(turn(strided, cos, sin), turn(copied, cos, sin))
        dy = make_inputs((70, 8, head_dim), dtype, seed=2)["x"][:, cut]  # strided as well
        results = []
        for x, upstream in ((strided, dy), (copied, dy.contiguous())):
            leaf, weight = x.detach().requires_grad_(), qkv["weight"].clone().requires_grad_()
            grads = torch.autograd.grad((norm(leaf, weight), turn(leaf, cos, sin)), (leaf, weight), (upstream, upstream))
            results.append(grads)
        assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_gradients_have_the_same_bits_in_every_run_and_with_two_threads(dtype: torch.dtype):
    inputs = make_inputs((700, 47), dtype)
    table = rope_inputs(300, 3, 22, dtype)
    runs = []
    for threads in (*THREADS, *THREADS):
        torch.set_num_threads(threads)
        runs.append(values_and_gradients(norm, list(inputs.values()))
                    + values_and_gradients(lambda x: turn(x, table["cos"], table["sin"]), [table["x"]]))
    for other in runs[1:]:
        assert all(same_bits(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_the_ops_write_every_element(dtype: torch.dtype):
    x, weight = make_inputs((37, 3, 22), dtype).values()
    table = rope_inputs(37, 3, 22, dtype)
    y, dx, dweight = torch.full_like(x, torch.nan), torch.full_like(x, torch.nan), torch.full((22,), torch.nan)
    for fill in (lambda: OPS.rms_norm_fwd(y, x, weight, 1e-6), lambda: OPS.rms_norm_bwd(dx, dweight, x, x, weight, 1e-6),
                 lambda: OPS.rope_fwd(y.fill_(torch.nan), x, table["cos"], table["sin"]),
                 lambda: OPS.rope_bwd(dx.fill_(torch.nan), x, table["cos"], table["sin"])):
        fill()
        assert y.isfinite().all()
    assert dx.isfinite().all() and dweight.isfinite().all()
    OPS.rms_norm_bwd(x[:0].clone(), dweight.fill_(torch.nan), x[:0], x[:0], weight, 1e-6)
    assert (dweight == 0).all()


def test_norm_and_rope_compile_whole():
    x, weight = make_inputs((9, 2, 8), F32).values()
    table = rope_inputs(9, 2, 8, F32)

    def layer(x: torch.Tensor) -> torch.Tensor:
        return turn(norm(x, weight), table["cos"], table["sin"])

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for got, want in zip(values_and_gradients(compiled, [x]), values_and_gradients(layer, [x]), strict=True):
        assert same_bits(got, want)


def test_bad_arguments_to_the_ops_are_named():
    x, w, table = torch.zeros(4, 6), torch.ones(6), torch.zeros(4, 3)
    heads = torch.zeros(4, 2, 6)
    for call, words in [
        (lambda: OPS.rms_norm_fwd(x, x.long(), w, 1e-6), "rms_norm_fwd: x must be f32 or bf16, got i64"),
        (lambda: OPS.rms_norm_fwd(x, torch.zeros(6, 4).T, w, 1e-6), "rms_norm_fwd: x must be .* last stride of 1 .* last stride 4"),
        (lambda: OPS.rms_norm_fwd(x, torch.zeros(6), w, 1e-6), "rms_norm_fwd: x must be .* of 1 dimensions"),
        (lambda: OPS.rms_norm_fwd(x[:3], x, w, 1e-6), r"rms_norm_fwd: y must be f32\[4, 6\] .* got f32\[3, 6\]"),
        (lambda: OPS.rms_norm_fwd(x, x, w[:5], 1e-6), r"rms_norm_fwd: weight must be f32\[6\] .* got f32\[5\]"),
        (lambda: OPS.rms_norm_bwd(x, w, x[:3], x, w, 1e-6), "rms_norm_bwd: dy must have x's shape of 4 rows of 6, got 3 of 6"),
        (lambda: OPS.rms_norm_bwd(x, w, x.bfloat16(), x, w, 1e-6), "rms_norm_bwd: dy must be f32.* got bf16"),
        (lambda: OPS.rms_norm_bwd(x, w[:2], x, x, w, 1e-6), r"rms_norm_bwd: dweight must be f32\[6\] .* got f32\[2\]"),
        (lambda: OPS.rope_fwd(heads, x, table, table), "rope_fwd: x must be .* got 2 dimensions"),
        (lambda: OPS.rope_fwd(heads, torch.zeros(4, 2, 5), table, table), "rope_fwd: x must be .* C = 5"),
        (lambda: OPS.rope_fwd(heads[:2], heads, table, table), r"rope_fwd: y must be f32\[4, 2, 6\]"),
        (lambda: OPS.rope_fwd(heads, heads, table[:3], table), r"rope_fwd: cos must be f32\[4, 3\] .* got f32\[3, 3\]"),
        (lambda: OPS.rope_bwd(heads, heads, table, table.double()), r"rope_bwd: sin must be f32\[4, 3\]"),
        (lambda: OPS.rope_bwd(heads, heads.int(), table, table), "rope_bwd: dy must be f32 or bf16, got i32"),
    ]:
        with pytest.raises(RuntimeError, match=words):
            call()
