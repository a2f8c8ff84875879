"""grpo_loss: every combination of options against plain loops in float64; splitting, masks, extremes, metrics, errors.

Tests of formulas run in float64, so on the reference; the last section compares each implementation with it in
float32.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from kernels.grpo_loss import OP, LossSpec, finish_metrics, make_inputs, merge_metrics
from kernels.triton_ops import IS_INTERPRETED
from tests.kernels.compare import same_bits, values_and_gradients
from tests.kernels.implementations import each_implementation
from tests.kernels.loss_cases import PER_TOKEN, arguments, by_hand, loss_of, rows_of, small, take, tokens, uneven

implementation = each_implementation(OP)

F64_NOISE = {"rtol": 1e-12, "atol": 1e-14}  # the same f64 sums in another order: some hundred roundings of 1e-16
# exp of a log ratio of order 1 has a few f32 roundings (6e-8); an advantage and a weight add some.
F32_NOISE = {"rtol": 3e-6, "atol": 3e-7}


def run(
    inputs: dict[str, Any], spec: LossSpec
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """loss, dloss/dlogprobs, dloss/dentropy, metrics."""
    logprobs, entropy = inputs["logprobs"].clone().requires_grad_(), inputs["entropy"].clone().requires_grad_()
    loss, metrics = loss_of({**inputs, "logprobs": logprobs, "entropy": entropy}, spec)
    dlogprobs, dentropy = torch.autograd.grad(loss, (logprobs, entropy), allow_unused=True)
    none = torch.zeros_like(logprobs)
    return loss.detach(), none if dlogprobs is None else dlogprobs, none if dentropy is None else dentropy, metrics


@pytest.mark.parametrize("normalizer", ["token", "sequence", "constant"])
@pytest.mark.parametrize("surrogate", ["clip", "cispo", "reinforce"])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_every_combination_is_its_formula(ratio: Any, surrogate: Any, normalizer: Any) -> None:
    inputs = small()
    for dual_clip, importance, kl, entropy_coef in itertools.product(
        (0.0, 1.5), ("none", "tis", "icepop"), (None, "k1", "k2", "k3"), (0.0, 0.01),
    ):
        spec = LossSpec(
            ratio=ratio, surrogate=surrogate, normalizer=normalizer, dual_clip=dual_clip, importance=importance,
            kl_coef=0.1 if kl else 0.0, kl_estimator=kl or "k3", entropy_coef=entropy_coef, constant_length=5)
        loss, dlogprobs, dentropy, metrics = run(inputs, spec)
        expected, dexpected = by_hand(inputs, spec)
        torch.testing.assert_close(loss, expected, **F64_NOISE, msg=lambda m, spec=spec: f"{spec}: {m}")
        torch.testing.assert_close(dlogprobs, dexpected, **F64_NOISE, msg=lambda m, spec=spec: f"{spec}: {m}")
        assert (dentropy < 0).all() if entropy_coef else (dentropy == 0).all()
        assert all(value.isfinite() for value in metrics.values()), (spec, metrics)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_the_gradient_is_the_slope_of_the_loss(ratio: Any, kl: Any) -> None:
    """By finite differences; not for "cispo", whose gradient differs from its slope by design (stop_gradient)."""
    inputs = small()
    for surrogate in ("clip", "reinforce"):
        spec = LossSpec(ratio=ratio, surrogate=surrogate, kl_coef=0.3, kl_estimator=kl, entropy_coef=0.2, dual_clip=1.5,
                        importance="tis", normalizer="sequence")

        def loss(lp: torch.Tensor, entropy: torch.Tensor, spec: LossSpec = spec) -> torch.Tensor:
            return loss_of({**inputs, "logprobs": lp, "entropy": entropy}, spec)[0]

        leaves = inputs["logprobs"].clone().requires_grad_(), inputs["entropy"].clone().requires_grad_()
        # Steps of 1e-6 stay on one side of every clip edge; the central difference is then good to about 1e-9.
        assert torch.autograd.gradcheck(loss, leaves, eps=1e-6, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("normalizer", ["token", "sequence", "constant"])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_microbatches_add_up_to_the_whole_batch(ratio: Any, normalizer: Any) -> None:
    spec = LossSpec(ratio=ratio, normalizer=normalizer, constant_length=9, kl_coef=0.1, entropy_coef=0.01,
                    importance="icepop")
    inputs = uneven()
    whole_loss, whole_grad, whole_dentropy, whole_metrics = run(inputs, spec)
    parts = [run(take(inputs, range(*cut)), spec) for cut in ((0, 1), (1, 1), (1, 4), (4, 6))]  # the second is empty
    losses, grads, dentropies, metrics = zip(*parts, strict=True)
    torch.testing.assert_close(torch.stack(losses).sum(), whole_loss, **F64_NOISE)
    torch.testing.assert_close(torch.cat(grads), whole_grad, **F64_NOISE)
    torch.testing.assert_close(torch.cat(dentropies), whole_dentropy, **F64_NOISE)
    torch.testing.assert_close(merge_metrics(metrics), merge_metrics([whole_metrics]), **F64_NOISE)


def test_the_order_of_microbatches_does_not_change_the_metrics() -> None:
    inputs, spec = uneven(), LossSpec()
    metrics = [run(take(inputs, range(s, s + 1)), spec)[3] for s in range(6)]
    torch.testing.assert_close(merge_metrics(metrics), merge_metrics(metrics[::-1]), **F64_NOISE)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_on_policy_the_ratio_is_exactly_one_and_all_surrogates_have_one_gradient(ratio: Any) -> None:
    inputs = uneven(torch.float32)
    inputs["old_logprobs"] = inputs["rollout_logprobs"] = inputs["logprobs"].clone()
    expected = -inputs["advantages"] / 34
    for surrogate in ("clip", "cispo", "reinforce"):
        _, grad, _, metrics = run(inputs, LossSpec(ratio=ratio, surrogate=surrogate))
        # One product and one quotient, in either order: at most two f32 roundings.
        torch.testing.assert_close(grad, expected, rtol=3e-7, atol=0)
        assert metrics["ratio_max"] == metrics["ratio_min"] == 1
        finished = finish_metrics(metrics)
        assert finished["ess"] == 1 and finished["approx_kl"] == 0 and finished["logprob_gap_max"] == 0
        assert finished["clip_low_fraction"] == finished["clip_high_fraction"] == 0


def test_clipped_tokens_get_zero_gradient_and_are_counted() -> None:
    #            down past the clip, A<0 | A>0 | up past it, A>0 | A<0 | up past the dual clip, A<0 | A=0
    inputs = tokens(logprobs=[-1.0, -1.0, 0.5, 0.5, 2.0, 2.0], advantages=[-1.0, 1.0, 1.0, -1.0, -1.0, 0.0])
    _, grad, _, metrics = run(inputs, LossSpec(dual_clip=3.0))
    assert (grad == 0).tolist() == [True, False, True, False, True, True]
    assert [int(metrics[f"clip_{k}_sum"]) for k in ("low", "high", "dual")] == [1, 1, 1]
    _, grad, _, metrics = run(inputs, LossSpec())
    assert (grad == 0).tolist() == [True, False, True, False, False, True]
    assert [int(metrics[f"clip_{k}_sum"]) for k in ("low", "high", "dual")] == [1, 1, 0]


def test_cispo_clips_the_weight_but_keeps_every_tokens_gradient() -> None:
    inputs = tokens(logprobs=[-1.0, 0.1, 1.0, 1.0], advantages=[1.0, 1.0, 1.0, -1.0])
    _, grad, _, metrics = run(inputs, LossSpec(surrogate="cispo", clip_low=0.2, clip_high=0.5))
    weight = torch.tensor([0.8, 1.1051709180756477, 1.5, -1.5], dtype=torch.float64)
    torch.testing.assert_close(grad, -weight / 4, **F64_NOISE)
    assert (int(metrics["clip_low_sum"]), int(metrics["clip_high_sum"])) == (1, 2)


def test_icepop_masks_and_tis_truncates_mismatched_tokens() -> None:
    inputs = tokens(logprobs=[0.0, 0.0, 0.0], old_logprobs=[0.0, 0.0, 0.0], rollout_logprobs=[-2.0, 2.0, -0.1],
                    advantages=[1.0, 1.0, 1.0])
    near = 1.1051709180756477  # exp(0.1)
    far = 0.1353352832366127  # exp(-2)
    for importance, weights in (("icepop", [0.0, 0.0, near]), ("tis", [2.0, far, near])):
        _, grad, _, metrics = run(inputs, LossSpec(importance=importance))
        torch.testing.assert_close(grad, -torch.tensor(weights, dtype=torch.float64) / 3, **F64_NOISE)
        assert int(metrics["importance_cut_sum"]) == weights.count(0.0) + weights.count(2.0)


def test_a_token_out_of_all_bounds_leaves_everything_finite() -> None:
    # exp(300) is inf in f32, and the gradient of min(inf, clipped) is 0 * inf = NaN without the bound on log ratios.
    for gap, advantage, ratio in itertools.product((-300.0, 300.0), (-1.0, 0.0, 1.0), ("token", "sequence")):
        inputs = {k: v.float() if k in PER_TOKEN else v for k, v in tokens(
            logprobs=[gap, 0.0], old_logprobs=[0.0, 0.0], rollout_logprobs=[-gap, 0.0], ref_logprobs=[-gap, 0.0],
            advantages=[advantage, 1.0]).items()}
        for surrogate in ("clip", "cispo", "reinforce"):
            spec = LossSpec(ratio=ratio, surrogate=surrogate, kl_coef=0.1, importance="tis")
            loss, grad, _, metrics = run(inputs, spec)
            assert loss.isfinite() and grad.isfinite().all()
            assert all(v.isfinite() for v in metrics.values())
            assert metrics["logprob_gap_max"] == abs(2 * gap)


@pytest.mark.parametrize("normalizer", ["token", "sequence", "constant"])
def test_an_empty_microbatch_has_zero_loss_and_still_backpropagates(normalizer: Any) -> None:
    hidden = torch.ones(3, requires_grad=True)
    inputs = make_inputs()["empty"]
    for ratio in ("token", "sequence"):
        inputs["logprobs"] = hidden.index_select(0, torch.zeros(0, dtype=torch.int64))
        spec = LossSpec(ratio=ratio, normalizer=normalizer, constant_length=4, kl_coef=0.1, importance="tis",
                        entropy_coef=0.1)
        loss, metrics = loss_of(inputs, spec)
        assert loss.item() == 0 and loss.shape == ()
        assert torch.autograd.grad(loss, hidden)[0].tolist() == [0.0, 0.0, 0.0]
        finished = finish_metrics(merge_metrics([metrics]))
        assert finished["num_loss_tokens"] == 0 and finished["kl"] == 0 and "ess" not in finished


def test_only_logprobs_and_entropy_get_gradients() -> None:
    inputs = uneven()
    leaves = {key: inputs[key].clone().requires_grad_() for key in PER_TOKEN}
    loss, metrics = loss_of({**inputs, **leaves}, LossSpec(kl_coef=0.1, importance="tis", entropy_coef=0.1, ratio="sequence"))
    loss.backward()
    assert {key for key, leaf in leaves.items() if leaf.grad is not None} == {"logprobs", "entropy"}
    assert not any(value.requires_grad for value in metrics.values())


def test_metrics_are_their_definitions() -> None:
    inputs = tokens(logprobs=[-1.0, -2.0], old_logprobs=[-1.5, -2.0], rollout_logprobs=[-1.4, -2.3],
                    ref_logprobs=[-1.0, -1.0], entropy=[0.5, 1.5], advantages=[1.0, -1.0])
    finished = finish_metrics(run(inputs, LossSpec(entropy_coef=0.1))[3])
    e = torch.tensor(1.0, dtype=torch.float64).exp().item()
    w = [e ** 0.4, e ** 0.3]
    expected = {
        "loss": (-1.2 + 1.0) / 2 - 0.1, "num_loss_tokens": 2.0, "clip_low_fraction": 0.0, "clip_high_fraction": 0.5,
        "clip_dual_fraction": 0.0, "approx_kl": (e ** 0.5 - 1.5) / 2, "kl": (e - 2) / 2, "entropy": 1.0,
        "ratio_max": e ** 0.5, "ratio_min": 1.0, "logprob_gap_max": 0.4,
        "ess": sum(w) ** 2 / (2 * sum(x * x for x in w)),
    }
    assert finished == pytest.approx(expected, rel=1e-12)


def test_metrics_of_missing_columns_are_left_out() -> None:
    inputs = {k: v for k, v in uneven().items() if k not in ("rollout_logprobs", "ref_logprobs", "entropy")}
    _, metrics = loss_of(inputs, LossSpec())
    assert not metrics.keys() & {"kl_sum", "entropy_sum", "logprob_gap_max", "importance_cut_sum"}
    assert "kl" not in finish_metrics(metrics)


def test_merging_refuses_what_it_cannot_merge() -> None:
    one = torch.tensor(1.0)
    for metrics, words in (
        ([], "at least one"),
        ([{"a_sum": one}, {"b_sum": one}], "same names"),
        ([{"a": one}, {"a": one}], "must end in one of"),
    ):
        with pytest.raises(ValueError, match=words):
            merge_metrics(metrics)


@pytest.mark.parametrize(("changes", "spec", "words"), [
    ({"ref_logprobs": None}, {"kl_coef": 0.1}, "kl_coef=0.1 needs ref_logprobs, got None"),
    ({"rollout_logprobs": None}, {"importance": "tis"}, "importance='tis' needs rollout_logprobs"),
    ({"entropy": None}, {"entropy_coef": 0.1}, "entropy_coef=0.1 needs entropy"),
    ({}, {"normalizer": "constant"}, "needs constant_length >= 1, got 0"),
    ({"total_loss_tokens": 33}, {}, "total_loss_tokens must .* at least the 34 .* got 33"),
    ({"total_sequences": 5}, {}, "total_sequences must .* at least the 6 .* got 5"),
    ({"num_sequences": 5}, {}, r"must ascend within 0\.\.4"),
    ({"sequence_index": torch.arange(34).flip(0), "num_sequences": 34, "total_sequences": 34}, {}, "must ascend"),
    ({"sequence_index": torch.zeros(34)}, {}, r"sequence_index must be i32\|i64\[34\], got f32\[34\]"),
    ({"old_logprobs": None}, {}, r"old_logprobs must be f64\[34\], got NoneType"),
    ({"advantages": torch.zeros(34)}, {}, r"advantages must be f64\[34\], got f32\[34\]"),
    ({"entropy": torch.zeros(33, dtype=torch.float64)}, {}, r"entropy must be f64\[34\], got f64\[33\]"),
    ({"logprobs": torch.zeros(34, dtype=torch.bfloat16)}, {}, r"logprobs must be f32\|f64\[N\], got bf16\[34\]"),
    ({"impl": "abacus"}, {}, "impl must be one of"),
])
def test_wrong_inputs_raise_with_expected_and_actual(changes: dict[str, Any], spec: dict[str, Any], words: str) -> None:
    given = {**uneven(), **changes}
    impl = given.pop("impl", "auto")
    with pytest.raises(ValueError, match=words):
        loss_of(given, LossSpec(**spec), impl)


# --- each implementation in float32, against the reference in float64 ------------------------------------------------------

def results(inputs: dict[str, Any], spec: LossSpec, impl: str = "auto") -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """[loss, dlogprobs, dentropy] for an upstream gradient of 3, metrics."""
    leaves = {name: inputs[name].clone().requires_grad_() for name in ("logprobs", "entropy") if inputs.get(name) is not None}
    loss, metrics = loss_of({**inputs, **leaves}, spec, impl)
    grads = torch.autograd.grad(loss * 3, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return [loss.detach(), *grads], metrics


def assert_agree(inputs: dict[str, Any], spec: LossSpec) -> None:
    got, measured = results(inputs, spec)
    wide = {name: value.double() if name in PER_TOKEN and value is not None else value for name, value in inputs.items()}
    want, expected = results(wide, spec, "reference")
    assert measured.keys() == expected.keys()
    for a, b in zip([*got, *measured.values()], [*want, *(expected[name] for name in measured)], strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, **F32_NOISE, equal_nan=True, msg=lambda m: f"{spec}: {m}")


@pytest.mark.parametrize("normalizer", ["token", "sequence", "constant"])
@pytest.mark.parametrize("surrogate", ["clip", "cispo", "reinforce"])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_every_combination_is_the_references(ratio: Any, surrogate: Any, normalizer: Any) -> None:
    inputs = make_inputs()["uneven"]
    combinations = itertools.product(
        ("none", "tis", "icepop"), (None, "k1", "k2", "k3"), (0.0, 1.5), (0.0, 0.01))
    for number, (importance, kl, dual_clip, entropy_coef) in enumerate(combinations):
        # Interpreted, a case takes 50 ms, so the last two options, which select no other code, alternate.
        if IS_INTERPRETED and number % 4 != number // 4 % 4:
            continue
        assert_agree(inputs, LossSpec(
            ratio=ratio, surrogate=surrogate, normalizer=normalizer, dual_clip=dual_clip, importance=importance,  # type: ignore[arg-type]
            importance_low=0.97, importance_high=1.02, kl_coef=0.1 if kl else 0.0, kl_estimator=kl or "k3",  # type: ignore[arg-type]
            entropy_coef=entropy_coef, constant_length=5))


@pytest.mark.parametrize("name", ["one_token", "uneven", "empty", "step"])
def test_missing_columns_have_no_metrics(name: str) -> None:
    inputs = make_inputs()[name]
    for absent in itertools.product((False, True), repeat=3):
        left_out = {key: None for key, is_out in zip(PER_TOKEN[3:], absent, strict=True) if is_out}
        assert_agree({**inputs, **left_out}, LossSpec())


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("lengths", [[3000, 0, 1025, 1, 47], [70_000, 3], [0, 0, 1, 0]], ids=str)
def test_long_sequences_empty_ones_and_wide_indices(ratio: Any, lengths: list[int]) -> None:
    index = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    generator = torch.Generator().manual_seed(1)
    columns = {name: -torch.rand(len(index), generator=generator) for name in PER_TOKEN}
    inputs = {**columns, "sequence_index": index, "num_sequences": len(lengths), "total_loss_tokens": 80_000, "total_sequences": 9}
    spec = LossSpec(ratio=ratio, normalizer="sequence", kl_coef=0.1, importance="tis", entropy_coef=0.1)
    assert_agree(inputs, spec)
    if len(index) > 65_536:  # once only: the interpreter takes seconds
        return
    again = [results({**inputs, "sequence_index": index.to(dtype)}, spec)[0] for dtype in (torch.int32, torch.int64)]
    assert all(same_bits(a, b) for a, b in zip(*again, strict=True))


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_a_sequences_gradients_have_the_same_bits_at_any_index(ratio: Any) -> None:
    inputs = uneven(torch.float32)
    spec = LossSpec(ratio=ratio, normalizer="sequence", kl_coef=0.1, importance="icepop", entropy_coef=0.1)
    _, *whole = results(inputs, spec)[0]
    for cut in (range(1), range(3, 4), range(3, 6), range(5, 6)):
        rows = torch.tensor([n for s in cut for n in rows_of(inputs, s)])
        _, *alone = results(take(inputs, cut), spec)[0]
        assert all(same_bits(a, b.index_select(0, rows)) for a, b in zip(alone, whole, strict=True))


def test_two_runs_have_the_same_bits() -> None:
    inputs = make_inputs()["uneven" if IS_INTERPRETED else "step"]
    spec = LossSpec(ratio="sequence", kl_coef=0.1, entropy_coef=0.1, importance="icepop")
    runs = [[*values, *metrics.values()] for values, metrics in (results(inputs, spec), results(inputs, spec))]
    assert all(same_bits(a, b) for a, b in zip(*runs, strict=True))


def test_far_log_ratios_are_capped_as_the_references_are() -> None:
    inputs = {name: value[:4].clone() if name in PER_TOKEN else value for name, value in make_inputs()["uneven"].items()}
    inputs |= {"sequence_index": torch.arange(4), "num_sequences": 4}
    inputs["logprobs"] = torch.tensor([-300.0, 300.0, -19.0, 21.0])
    for surrogate, kl in itertools.product(("clip", "cispo", "reinforce"), ("k1", "k2", "k3")):
        spec = LossSpec(surrogate=surrogate, kl_coef=0.1, kl_estimator=kl)  # type: ignore[arg-type]
        (got, measured), (want, expected) = results(inputs, spec), results(inputs, spec, "reference")
        for a, b in zip([*got, *measured.values()], [*want, *(expected[name] for name in measured)], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # both in f32: exp of 20 magnifies its argument's rounding


def test_a_broken_logprob_shows_in_loss_gradient_and_metrics(implementation: str) -> None:
    inputs = make_inputs()["uneven"]
    inputs["logprobs"][9] = math.nan
    (loss, grad, _), metrics = results(inputs, LossSpec())
    assert loss.isnan()
    if implementation != "reference":  # torch's clamp lets no gradient through to a NaN
        assert int(grad.isnan().sum()) == 1 and grad[9].isnan()
    assert all(metrics[name].isnan() for name in ("approx_kl_sum", "w_sum", "ratio_max", "ratio_min", "logprob_gap_max"))


def test_a_sequence_index_out_of_range_shows_where_it_is_not_checked(implementation: str) -> None:
    """On a GPU the public op cannot check it without a sync: nothing may be read out of bounds, and the loss is NaN."""
    if implementation != "triton":
        pytest.skip("checked in advance")
    inputs, run = make_inputs()["uneven"], OP.choose(torch.empty(0)).run
    for bad in (-1, 6, 2**31 - 1):
        inputs["sequence_index"][33 if bad > 0 else 0] = bad
        logprobs, constants, entropy = arguments(inputs)
        loss, _ = run(logprobs, constants, LossSpec(normalizer="sequence"), entropy)
        assert loss.isnan()


def test_it_compiles_whole(implementation: str) -> None:
    """Below the checks of the public op, which read sequence_index."""
    if implementation == "reference":
        pytest.skip("plain torch")
    inputs, spec, run = make_inputs()["uneven"], LossSpec(entropy_coef=0.1), OP.choose(torch.empty(0)).run

    _, constants, _ = arguments(inputs)

    def loss(logprobs: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
        value: torch.Tensor = run(logprobs, constants, spec, entropy)[0]
        return value

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    pair = [inputs["logprobs"], inputs["entropy"]]
    eager = values_and_gradients(loss, pair)
    assert all(same_bits(a, b) for a, b in zip(values_and_gradients(compiled, pair), eager, strict=True))
