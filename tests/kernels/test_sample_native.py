"""The native sample: scores that its fast noise cannot separate, its threads, and the argument checks below the
public op."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from kernels.linear_logprob import linear_logprob
from kernels.native import ISA, OPS
from kernels.sample import make_inputs, sample
from kernels.sample.philox import gumbel
from tests.kernels.compare import THREADS, assert_rows_keep_their_bits, same_bits

pytestmark = pytest.mark.skipif(not ISA, reason="needs the native library")
F32, BF16 = torch.float32, torch.bfloat16
native = partial(sample, impl="native")


def test_equal_logits_draw_where_the_noise_is_largest_whatever_the_key():
    keys = torch.tensor([0, -1, 2**62, -(2**63), 12345, 2**32, 2**31]).repeat_interleave(40)
    positions = torch.arange(40).repeat(7) * 2**29
    token, _, _ = native(torch.zeros(280, 2), torch.ones(200, 2), keys, positions)
    assert torch.equal(token, gumbel(keys, positions, 200).argmax(-1))


def test_scores_a_rounding_apart_are_settled_as_the_reference_settles_them():
    """Two tokens whose scores differ by a few units in the last place or by nothing: the fast estimate must not decide."""
    num_rows = 500
    keys, positions = torch.arange(num_rows) * 7919, torch.arange(num_rows)
    noise = gumbel(keys, positions, 2)
    ulps = (torch.arange(num_rows) % 9 - 4) * 2.0**-23
    weight = torch.stack((torch.zeros(num_rows), noise[:, 0] - noise[:, 1] + ulps))
    tokens = [sample(torch.eye(num_rows), weight, keys, positions, impl=impl)[0] for impl in ("native", "reference")]
    assert torch.equal(*tokens) and 0.2 < float(tokens[0].double().mean()) < 0.8


@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}, {"temperature": 0.0}], ids=str)
def test_a_row_draws_the_same_in_any_batch_of_a_large_vocabulary(options: dict[str, float]):
    inputs = make_inputs(260, 9, 2500, BF16)

    def rows(start: int, end: int) -> tuple[torch.Tensor, ...]:
        cut = {name: inputs[name][start:end] for name in ("hidden", "keys", "positions")}
        return native(weight=inputs["weight"], **cut, **options)  # type: ignore[arg-type]

    assert_rows_keep_their_bits(rows, rows=(1, 7, 64))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_the_logprob_has_the_bits_of_linear_logprob_over_several_chunks_and_with_a_master_weight(dtype: torch.dtype):
    inputs = make_inputs(20, 9, 2500, dtype)
    inputs["weight"] = make_inputs(20, 9, 2500, F32)["weight"]
    token, logprob, _ = native(**inputs, temperature=0.7)
    again, _ = linear_logprob(inputs["hidden"], inputs["weight"], token, 0.7, impl="native")
    assert same_bits(logprob, again)
    rounded = native(**{**inputs, "weight": inputs["weight"].to(dtype)}, temperature=0.7)
    assert torch.equal(token, rounded[0]) and same_bits(logprob, rounded[1])


def test_the_first_broken_row_is_named_whatever_the_threads():
    inputs = make_inputs(300, 4, 6, F32)
    inputs["hidden"][[7, 250]] = math.nan
    for threads in THREADS:
        torch.set_num_threads(threads)
        with pytest.raises(ValueError, match=r"^sample: the logits of row 7 hold NaN or inf; the weights or .* broken$"):
            native(**inputs)


def test_the_op_writes_every_element():
    inputs = make_inputs(131, 5, 1, F32)
    token, logprob, kept = torch.full((131,), -7), torch.full((131,), torch.nan), torch.full((131,), torch.nan)
    OPS.sample(token, logprob, kept, *inputs.values(), 1.0, 0, 1.0, 0.0)
    assert (token == 0).all() and (logprob == 0).all() and (kept == 0).all()


def test_bad_arguments_to_the_op_are_named():
    inputs = make_inputs(3, 4, 7, F32)
    good = {"token": torch.zeros(3, dtype=torch.int64), "logprob": torch.zeros(3), "kept_logmass": torch.zeros(3), **inputs}
    for name, value in [
        ("token", torch.zeros(3)), ("token", torch.zeros(2, dtype=torch.int64)), ("logprob", torch.zeros(4)),
        ("kept_logmass", torch.zeros(3).double()), ("hidden", inputs["hidden"].half()), ("hidden", torch.zeros(4, 3).T),
        ("hidden", inputs["hidden"][0]), ("weight", inputs["weight"][:, :3]), ("weight", inputs["weight"][:0]),
        ("weight", inputs["weight"].bfloat16()), ("keys", inputs["keys"].int()), ("positions", inputs["positions"][1:])]:
        with pytest.raises(RuntimeError, match=rf"sample: {name} (and weight )?must"):
            OPS.sample(*{**good, name: value}.values(), 1.0, 0, 1.0, 0.0)
    for options in ((-1.0, 0, 1.0, 0.0), (1.0, -1, 1.0, 0.0), (1.0, 0, 0.0, 0.0), (1.0, 0, 1.0, 1.5), (math.nan, 0, 1.0, 0.0)):
        with pytest.raises(RuntimeError, match="sample: needs temperature >= 0"):
            OPS.sample(*good.values(), *options)
