"""The native linear_logprob: vocabularies of several chunks, f32 masters, bits of the gradients, flat memory, bad arguments."""

from __future__ import annotations

import resource
from functools import partial

import pytest
import torch

from kernels.linear_logprob import linear_logprob, make_inputs
from kernels.native import ISA, OPS
from tests.kernels.compare import THREADS, assert_no_worse_than_plain, assert_rows_keep_their_bits, same_bits, values_and_gradients
from tests.kernels.test_linear_logprob import definition

pytestmark = pytest.mark.skipif(not ISA, reason="needs the native library")
F32, BF16 = torch.float32, torch.bfloat16
native = partial(linear_logprob, impl="native")
# (N, D, V): the vocabulary is taken 1024 tokens at a time; rows in blocks; odd sizes. Few rows
# with a long sum are left out, for test_linear.py's reason.
SHAPES = [(1, 1, 1), (47, 47, 123), (123, 3, 1024), (20, 16, 1025), (600, 8, 2100)]


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_no_worse_than_log_softmax(shape: tuple[int, int, int], dtype: torch.dtype):
    op, plain = (lambda hidden, weight, ids, f=f: f(hidden, weight, ids, 0.8) for f in (native, definition))
    assert_no_worse_than_plain(op, plain, plain, list(make_inputs(*shape, dtype).values()))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("hidden_size", "vocab_size"), [(16, 1500), (33, 70)])
def test_a_row_has_the_same_bits_in_any_batch(hidden_size: int, vocab_size: int, dtype: torch.dtype):
    inputs = make_inputs(260, hidden_size, vocab_size, dtype)
    assert_rows_keep_their_bits(
        lambda start, end: native(inputs["hidden"][start:end], inputs["weight"], inputs["target_ids"][start:end]))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_gradients_have_the_same_bits_in_every_run_and_with_two_threads(dtype: torch.dtype):
    runs = []
    for threads in (*THREADS, *THREADS):
        torch.set_num_threads(threads)
        runs.append([result for shape in ((700, 33, 45), (300, 8, 1100))
                     for result in values_and_gradients(native, list(make_inputs(*shape, dtype).values()))])
    for other in runs[1:]:
        assert all(same_bits(a, b) for a, b in zip(runs[0], other, strict=True))


def test_a_gradient_that_is_not_asked_for_counts_as_zero():
    inputs = make_inputs(30, 8, 20, F32)
    for part in (0, 1):
        gradients = []
        for impl in ("native", "reference"):
            hidden = inputs["hidden"].clone().requires_grad_()
            results = linear_logprob(hidden, inputs["weight"], inputs["target_ids"], impl=impl)
            gradients += torch.autograd.grad(results[part].sum(), hidden)
        got, want = gradients
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)  # sums over 20 tokens in another order


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_the_ops_write_every_element_and_take_rows_of_any_number(dtype: torch.dtype):
    for rows, vocab, hidden_size in ((0, 5, 5), (7, 1, 5), (131, 1030, 5), (7, 3, 0)):
        hidden, weight, ids = make_inputs(rows, max(hidden_size, 1), vocab, dtype).values()
        hidden, weight = hidden[:, :hidden_size].contiguous(), weight[:, :hidden_size].contiguous()
        logprob, entropy, stats = (torch.full(size, torch.nan) for size in ((rows,), (rows,), (rows, 2)))
        OPS.linear_logprob_fwd(logprob, entropy, stats, hidden, weight, ids, 1.0)
        dhidden, dweight = torch.full_like(hidden, torch.nan), torch.full(weight.shape, torch.nan)
        OPS.linear_logprob_bwd(dhidden, dweight, logprob, entropy, hidden, weight, ids, stats, entropy, 1.0)
        assert all(x.isfinite().all() for x in (logprob, entropy, stats, dhidden, dweight))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_nothing_at_all_has_a_gradient_of_nothing(dtype: torch.dtype):
    for hidden_size in (0, 5):
        hidden, weight = torch.zeros(0, hidden_size, dtype=dtype), torch.zeros(0, hidden_size, dtype=dtype)
        results = values_and_gradients(lambda h, w: native(h, w, torch.zeros(0, dtype=torch.int64)), [hidden, weight])
        assert [x.numel() for x in results] == [0] * 4


def test_memory_does_not_grow_with_tokens_times_vocabulary():
    """The logits would take 400 MB; the weight, its packed chunk and its gradient take 1 MB each."""
    inputs = make_inputs(2000, 4, 50_000, F32)
    leaves = [inputs["hidden"].requires_grad_(), inputs["weight"].requires_grad_()]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    logprob, entropy = native(*leaves, inputs["target_ids"])
    torch.autograd.grad(logprob.sum() + entropy.sum(), leaves)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60_000  # KB; it was 8,000


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_torchs_own_gemm_is_available_by_name_and_agrees(dtype: torch.dtype):
    inputs = make_inputs(5, 16, 43, dtype)
    for got, want in zip(linear_logprob(**inputs, impl="torch"), linear_logprob(**inputs, impl="reference"), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=2e-6)  # f32 sums in another order


@pytest.mark.parametrize("bad", [-1, 12, 1 << 40, -(1 << 40)])
def test_targets_outside_of_the_vocabulary_are_refused_before_anything_is_read(bad: int):
    inputs = make_inputs(9, 8, 12, F32)
    inputs["target_ids"][5] = bad
    with pytest.raises(RuntimeError, match=rf"target_ids must be in 0\.\.11, got {bad} in row 5"):
        native(**inputs)


def test_bad_arguments_to_the_ops_are_named():
    hidden, weight, ids = make_inputs(9, 8, 12, F32).values()
    row, stats = torch.zeros(9), torch.zeros(9, 2)
    good = {"logprob": row, "entropy": row.clone(), "stats": stats, "hidden": hidden, "weight": weight, "target_ids": ids}
    back = {"dhidden": torch.zeros(9, 8), "dweight": torch.zeros(12, 8), "dlogprob": row, "dentropy": row, "hidden": hidden,
            "weight": weight, "target_ids": ids, "stats": stats, "entropy": row}
    for op, arguments, name, value in [
        (OPS.linear_logprob_fwd, good, "logprob", row[:8]), (OPS.linear_logprob_fwd, good, "entropy", row.double()),
        (OPS.linear_logprob_fwd, good, "stats", row), (OPS.linear_logprob_fwd, good, "hidden", hidden.double()),
        (OPS.linear_logprob_fwd, good, "hidden", hidden[0]), (OPS.linear_logprob_fwd, good, "weight", weight[:, :7]),
        (OPS.linear_logprob_fwd, good, "weight", weight.bfloat16()), (OPS.linear_logprob_fwd, good, "weight", weight[:0]),
        (OPS.linear_logprob_fwd, good, "target_ids", ids.int()), (OPS.linear_logprob_fwd, good, "target_ids", ids[:3]),
        (OPS.linear_logprob_bwd, back, "dhidden", hidden.bfloat16()), (OPS.linear_logprob_bwd, back, "dweight", weight.bfloat16()),
        (OPS.linear_logprob_bwd, back, "dlogprob", row[:2]), (OPS.linear_logprob_bwd, back, "dentropy", stats),
        (OPS.linear_logprob_bwd, back, "target_ids", ids + 12), (OPS.linear_logprob_bwd, back, "stats", stats.T),
        (OPS.linear_logprob_bwd, back, "entropy", row[1:]),
    ]:
        with pytest.raises(RuntimeError, match=rf"linear_logprob_...: .*{name} (and weight )?must"):
            op(*{**arguments, name: value}.values(), 1.0)
    with pytest.raises(RuntimeError, match="linear_logprob_fwd: temperature must be above 0, got nan"):
        OPS.linear_logprob_fwd(*good.values(), torch.nan)
