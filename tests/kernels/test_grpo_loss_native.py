"""The native grpo_loss beside the reference in float64: loss, both gradients and every metric, for every combination of options."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from kernels.grpo_loss import LossSpec, grpo_loss, make_inputs
from kernels.grpo_loss.native import METRICS, grpo_loss_native
from kernels.native import ISA, OPS
from tests.kernels.compare import THREADS, same_bits, values_and_gradients

pytestmark = pytest.mark.skipif(not ISA, reason="needs the native library")
PER_TOKEN = ("logprobs", "old_logprobs", "advantages", "rollout_logprobs", "ref_logprobs", "entropy")
# exp of a log ratio of order 1 carries a few f32 roundings (6e-8); an advantage and a weight some more.
F32_NOISE = {"rtol": 3e-6, "atol": 3e-7}


def run(inputs: dict[str, Any], spec: LossSpec, impl: str) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """[loss, dlogprobs, dentropy], metrics"""
    leaves = {name: inputs[name].clone().requires_grad_() for name in ("logprobs", "entropy") if inputs.get(name) is not None}
    loss, metrics = grpo_loss(**{**inputs, **leaves}, spec=spec, impl=impl)
    grads = torch.autograd.grad(loss * 3, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return [loss.detach(), *grads], metrics


def assert_agree(inputs: dict[str, Any], spec: LossSpec) -> None:
    got, measured = run(inputs, spec, "native")
    wide = {name: value.double() if name in PER_TOKEN and value is not None else value for name, value in inputs.items()}
    want, expected = run(wide, spec, "reference")
    assert measured.keys() == expected.keys()
    for a, b in zip([*got, *measured.values()], [*want, *(expected[name] for name in measured)], strict=True):
        torch.testing.assert_close(a.double(), b, **F32_NOISE, equal_nan=True, msg=lambda m: f"{spec}: {m}")


@pytest.mark.parametrize("normalizer", ["token", "sequence", "constant"])
@pytest.mark.parametrize("surrogate", ["clip", "cispo", "reinforce"])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_every_combination_is_the_references(ratio: Any, surrogate: Any, normalizer: Any) -> None:
    inputs = make_inputs()["uneven"]
    for dual_clip, importance, kl, entropy_coef in itertools.product(
        (0.0, 1.5), ("none", "tis", "icepop"), (None, "k1", "k2", "k3"), (0.0, 0.01),
    ):
        assert_agree(inputs, LossSpec(
            ratio=ratio, surrogate=surrogate, normalizer=normalizer, dual_clip=dual_clip, importance=importance,  # type: ignore[arg-type]
            importance_low=0.97, importance_high=1.02, kl_coef=0.1 if kl else 0.0, kl_estimator=kl or "k3",  # type: ignore[arg-type]
            entropy_coef=entropy_coef, constant_length=5))


@pytest.mark.parametrize("name", ["one_token", "uneven", "empty", "step"])
def test_what_is_not_given_is_not_measured(name: str) -> None:
    inputs = make_inputs()[name]
    for absent in itertools.product((False, True), repeat=3):
        left_out = {key: None for key, is_out in zip(PER_TOKEN[3:], absent, strict=True) if is_out}
        assert_agree({**inputs, **left_out}, LossSpec())


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_long_sequences_and_wide_indices(ratio: Any) -> None:
    """Sequences longer than the tokens whose sums are kept in f32 (1024)."""
    lengths = torch.tensor([3000, 0, 1025, 1, 47])
    index = torch.repeat_interleave(torch.arange(5), lengths)
    generator = torch.Generator().manual_seed(1)
    columns = {name: -torch.rand(len(index), generator=generator) for name in PER_TOKEN}
    inputs = {**columns, "sequence_index": index, "num_sequences": 5, "total_loss_tokens": 5000, "total_sequences": 9}
    spec = LossSpec(ratio=ratio, normalizer="sequence", kl_coef=0.1, importance="tis", entropy_coef=0.1)
    assert_agree(inputs, spec)
    results = [run({**inputs, "sequence_index": index.to(dtype)}, spec, "native")[0] for dtype in (torch.int32, torch.int64)]
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


def test_far_log_ratios_are_capped_as_the_references_are() -> None:
    inputs = {name: value[:4].clone() if name in PER_TOKEN else value for name, value in make_inputs()["uneven"].items()}
    inputs |= {"sequence_index": torch.arange(4), "num_sequences": 4}
    inputs["logprobs"] = torch.tensor([-300.0, 300.0, -19.0, 21.0])
    for surrogate, kl in itertools.product(("clip", "cispo", "reinforce"), ("k1", "k2", "k3")):
        got, measured = run(inputs, LossSpec(surrogate=surrogate, kl_coef=0.1, kl_estimator=kl), "native")  # type: ignore[arg-type]
        want, expected = run(inputs, LossSpec(surrogate=surrogate, kl_coef=0.1, kl_estimator=kl), "reference")  # type: ignore[arg-type]
        for a, b in zip([*got, *measured.values()], [*want, *(expected[name] for name in measured)], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # both in f32: exp of 20 magnifies its argument's rounding


def test_a_broken_logprob_shows_in_loss_gradient_and_metrics() -> None:
    inputs = make_inputs()["uneven"]
    inputs["logprobs"][9] = math.nan
    (loss, grad, _), metrics = run(inputs, LossSpec(), "native")
    assert loss.isnan() and int(grad.isnan().sum()) == 1 and grad[9].isnan()
    assert all(metrics[name].isnan() for name in ("approx_kl_sum", "w_sum", "ratio_max", "ratio_min", "logprob_gap_max"))


def test_the_same_bits_in_every_run_and_with_two_threads() -> None:
    inputs, spec = make_inputs()["step"], LossSpec(ratio="sequence", kl_coef=0.1, entropy_coef=0.1, importance="icepop")
    runs = []
    for threads in (*THREADS, *THREADS):
        torch.set_num_threads(threads)
        results, metrics = run(inputs, spec, "native")
        runs.append([*results, *metrics.values()])
    for other in runs[1:]:
        assert all(same_bits(a, b) for a, b in zip(runs[0], other, strict=True))


def arguments(**changes: Any) -> list[Any]:
    inputs = make_inputs()["uneven"]
    n = len(inputs["logprobs"])
    named = {
        "loss": torch.full((), torch.nan), "metrics": torch.full((len(METRICS),), torch.nan),
        "dlogprobs": torch.full((n,), torch.nan), "dentropy": torch.full((n,), torch.nan),
        **{name: inputs[name] for name in ("logprobs", "old_logprobs", "advantages", "sequence_index", *PER_TOKEN[3:])},
        "choices": [0, 0, 2, 0, 0], "counts": [6, n, 6, 0], "numbers": [0.2, 0.2, 0.0, 0.1, 0.5, 2.0, 0.1]}
    assert set(changes) <= set(named)
    return list({**named, **changes}.values())


def test_the_op_writes_every_element() -> None:
    filled = arguments()
    OPS.grpo_loss(*filled)
    assert all(tensor.isfinite().all() for tensor in filled[:4])


def test_it_compiles_whole() -> None:
    """Behind the checks of the public op, which read sequence_index."""
    inputs, spec = make_inputs()["uneven"], LossSpec(entropy_coef=0.1)

    def loss_of(logprobs: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
        return grpo_loss_native(**{**inputs, "logprobs": logprobs, "entropy": entropy}, spec=spec)[0]

    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    pair = [inputs["logprobs"], inputs["entropy"]]
    eager = values_and_gradients(loss_of, pair)
    assert all(same_bits(a, b) for a, b in zip(values_and_gradients(compiled, pair), eager, strict=True))


@pytest.mark.parametrize(("name", "value"), [
    ("loss", torch.zeros(1)), ("metrics", torch.zeros(3)), ("dlogprobs", torch.zeros(3)), ("dentropy", torch.zeros(0)),
    ("logprobs", torch.zeros(34, 1)), ("old_logprobs", torch.zeros(34).double()), ("advantages", torch.zeros(33)),
    ("rollout_logprobs", torch.zeros(68)[::2]), ("ref_logprobs", None), ("entropy", None), ("sequence_index", torch.zeros(34)),
    ("sequence_index", torch.zeros(33, dtype=torch.int64)), ("sequence_index", torch.full((34,), 6)),
    ("sequence_index", torch.full((34,), -1)), ("sequence_index", torch.arange(34).flip(0) // 6),
    ("choices", [0, 0, 2, 0]), ("choices", [2, 0, 2, 0, 0]), ("choices", [0, 3, 2, 0, 0]), ("choices", [0, 0, 2, 0, -1]),
    ("choices", [0, 0, 2, 0, 2]), ("counts", [6, 34, 5, 0]), ("counts", [-1, 34, 6, 0]), ("numbers", [0.2])])  # fmt: skip
def test_bad_arguments_to_the_op_are_named(name: str, value: Any) -> None:
    words = "counts must" if value == [0, 0, 2, 0, 2] else name + ".* must"  # divided by a constant length of 0
    with pytest.raises(RuntimeError, match=f"grpo_loss: .*{words}"):
        OPS.grpo_loss(*arguments(**{name: value}))
