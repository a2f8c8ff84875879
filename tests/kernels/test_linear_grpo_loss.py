"""linear_grpo_loss against its two ops called in turn: loss, metrics, logprobs, gradients, and blocks of rows."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from kernels.grpo_loss import LossInputs, LossSpec, grpo_loss
from kernels.linear_grpo_loss import OP, linear_grpo_loss, make_inputs
from kernels.linear_logprob import function, linear_logprob
from kernels.triton_ops import IS_INTERPRETED
from tests.kernels.compare import assert_no_worse_than_plain, same_bits, values_and_gradients
from tests.kernels.implementations import each_implementation
from tests.kernels.test_linear_logprob import definition

implementation = each_implementation(OP)

F32, BF16 = torch.float32, torch.bfloat16
SPECS = {
    "grpo": LossSpec(normalizer="sequence"),
    "dapo with dual clip and a bonus": LossSpec(clip_high=0.28, dual_clip=3.0, entropy_coef=0.01),
    "gspo": LossSpec(ratio="sequence", normalizer="sequence", kl_coef=0.1),
    "cispo weighed": LossSpec(surrogate="cispo", importance="tis", normalizer="constant", constant_length=17),
    "reinforce masked": LossSpec(surrogate="reinforce", importance="icepop", kl_coef=0.1, kl_estimator="k1"),
}
LEAVES = ("hidden", "weight")


def case(dtype: torch.dtype = F32, lengths: Sequence[int] = (5, 1, 0, 17, 3, 8), vocab_size: int = 43) -> dict[str, Any]:
    return make_inputs(list(lengths), 24, vocab_size, dtype)


def split(inputs: dict[str, Any]) -> tuple[list[torch.Tensor], LossInputs]:
    """-> ([hidden, weight, target_ids], the constants of the loss)"""
    head = (*LEAVES, "target_ids")
    return [inputs[key] for key in head], LossInputs(**{key: value for key, value in inputs.items() if key not in head})


def fused(
    inputs: dict[str, Any], spec: LossSpec, temperature: float = 1.0, impl: str = "auto"
) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    head, constants = split(inputs)
    return linear_grpo_loss(*head, constants, spec, temperature, impl)


def in_turn(inputs: dict[str, Any], spec: LossSpec, impl: str) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    """The two ops; impl "plain": torch's log_softmax in the operands' dtype."""
    head, constants = split(inputs)
    logprobs, entropy = definition(*head, 0.8) if impl == "plain" else linear_logprob(*head, 0.8, impl=impl)
    loss, metrics = grpo_loss(logprobs, constants, spec, entropy, "reference" if impl == "plain" else impl)
    return loss, metrics, logprobs


def widened(inputs: dict[str, Any]) -> dict[str, Any]:
    return {key: value.double() if key not in LEAVES and isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for key, value in inputs.items()}


def check_gradients(inputs: dict[str, Any], spec: LossSpec) -> None:
    """The loss is right, and its gradients are no worse than plain torch's, whose bf16 logits are rounded."""
    exact = widened(inputs)

    def ours(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return fused(inputs | {"hidden": hidden, "weight": weight}, spec, 0.8)[0]

    def plain(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        given = exact if hidden.dtype == torch.float64 else inputs
        return in_turn(given | {"hidden": hidden, "weight": weight}, spec, "plain")[0]

    pair = [inputs[key] for key in LEAVES]
    # The mean of errors of a few ulp of logprobs around 4, at advantages around 1.
    torch.testing.assert_close(ours(*pair).double(), plain(*(x.double() for x in pair)), rtol=0, atol=1e-6)
    # The error of one scalar is chance, so only gradients are compared.
    assert_no_worse_than_plain(*(lambda *x, f=f: f(*x) - f(*x).detach() for f in (ours, plain, plain)), pair)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("name", SPECS)
def test_loss_and_gradients_are_no_worse_than_plain_torchs(name: str, dtype: torch.dtype):
    check_gradients(case(dtype), SPECS[name])


def with_leaves(inputs: dict[str, Any]) -> dict[str, Any]:
    return inputs | {key: inputs[key].clone().requires_grad_() for key in LEAVES}


@pytest.mark.parametrize("name", SPECS)
def test_everything_has_the_bits_of_the_two_ops_called_in_turn(name: str, implementation: str):
    if implementation == "triton" and not IS_INTERPRETED:
        pytest.skip("the two ops would run on the CPU")
    inputs = case()
    one, two = with_leaves(inputs), with_leaves(inputs)
    loss, metrics, logprobs = fused(one, SPECS[name], 0.8)
    want, want_metrics, want_logprobs = in_turn(two, SPECS[name], "auto" if implementation == "in_turn" else implementation)
    assert not logprobs.requires_grad and same_bits(logprobs, want_logprobs.detach()) and same_bits(loss, want)
    assert metrics.keys() == want_metrics.keys() and all(same_bits(metrics[key], want_metrics[key]) for key in metrics)
    for result in (loss, want):
        (4 * result).backward()  # a power of 2: after the products as before them
    assert all(same_bits(one[key].grad, two[key].grad) for key in LEAVES)


@pytest.mark.parametrize("name", ["dapo with dual clip and a bonus", "gspo"])
def test_rows_in_blocks_give_the_same_loss_and_gradients_as_right(
    name: str, implementation: str, monkeypatch: pytest.MonkeyPatch
):
    """A budget for the softmax of 128 rows: several blocks at the token level; the sequence level recomputes all."""
    if implementation != "triton":
        pytest.skip("the Triton kernels alone have a budget")
    inputs = case(BF16, [60, 90, 1, 150], 1100)
    whole = fused(inputs, SPECS[name], 0.8)
    monkeypatch.setattr(function, "SOFTMAX_BYTES", 2 * 1100 * 128)
    keep, kept = function.kept_softmax, []

    def keep_one(*args: Any) -> tuple[torch.Tensor, ...]:
        assert all(softmax() is None for softmax in kept), "the budget is one block: the last block's softmax must be freed"
        made = keep(*args)
        kept.append(weakref.ref(made[0]))
        return made

    monkeypatch.setattr(function, "kept_softmax", keep_one)
    check_gradients(inputs, SPECS[name])
    assert len(kept) >= (3 if name != "gspo" else 1)
    loss, metrics, logprobs = fused(with_leaves(inputs), SPECS[name], 0.8)
    assert same_bits(loss.detach(), whole[0]) and same_bits(logprobs, whole[2])
    assert all(same_bits(metrics[key], value) for key, value in whole[1].items())


def test_no_tokens_give_a_loss_of_zero_and_zero_gradients():
    inputs = with_leaves(case(lengths=[]))
    loss, metrics, logprobs = fused(inputs, SPECS["grpo"])
    loss.backward()
    assert loss.item() == 0 and float(metrics["num_tokens_sum"]) == 0 and logprobs.shape == (0,)
    assert inputs["hidden"].grad.shape == (0, 24) and not inputs["weight"].grad.any()


def test_without_a_gradient_wanted_the_loss_is_the_same():
    inputs = case()
    wanted = fused(with_leaves(inputs), SPECS["grpo"])[0]
    loss = fused(inputs, SPECS["grpo"])[0]
    assert not loss.requires_grad and same_bits(loss, wanted.detach())


def test_an_f32_master_gets_its_gradient_in_f32():
    inputs = case(BF16)
    rounded, master = with_leaves(inputs), with_leaves(inputs | {"weight": inputs["weight"].float()})
    for given in (rounded, master):
        fused(given, SPECS["grpo"])[0].backward()
    assert master["weight"].grad.dtype == F32 and same_bits(master["hidden"].grad, rounded["hidden"].grad)
    assert same_bits(master["weight"].grad.bfloat16(), rounded["weight"].grad)


def test_gradients_have_the_same_bits_in_every_run():
    inputs = case(BF16)
    runs = [values_and_gradients(lambda h, w: fused(inputs | {"hidden": h, "weight": w}, SPECS["gspo"])[0],
                                 [inputs[key] for key in LEAVES]) for _ in range(2)]
    assert all(map(same_bits, *runs))


def test_a_second_derivative_is_an_error_and_not_silently_nothing(implementation: str):
    if implementation == "reference":
        pytest.skip("torch's own has one")
    inputs = with_leaves(case())
    loss = fused(inputs, SPECS["grpo"])[0]
    (gradient,) = torch.autograd.grad(loss.square(), inputs["weight"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_it_compiles_whole():
    inputs = case()
    pair = [inputs[key] for key in LEAVES]

    def loss(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return fused(inputs | {"hidden": hidden, "weight": weight}, SPECS["grpo"])[0]

    # sequence_index's values are read on the CPU, which breaks a graph; on a GPU they are not.
    compiled = torch.compile(loss, backend="aot_eager")
    assert all(map(same_bits, values_and_gradients(compiled, pair), values_and_gradients(loss, pair)))


def test_wrong_arguments_raise_with_expected_and_actual():
    inputs, spec = case(), SPECS["grpo"]
    for name, value, says in (
        ("hidden", inputs["hidden"][0], r"hidden must be .*\[N, D\], got f32\[24\] on cpu"),
        ("weight", inputs["weight"].T, r"weight must be f32\[V, 24\], got f32\[24, 43\] on cpu"),
        ("target_ids", inputs["target_ids"].int(), r"target_ids must be i64\[34\], got i32\[34\] on cpu"),
        ("temperature", 0.0, r"temperature must be above 0, got 0.0"),
        ("old_logprobs", inputs["old_logprobs"][1:], r"old_logprobs must be f32\[34\], got f32\[33\] on cpu"),
        ("advantages", inputs["advantages"].double(), r"advantages must be f32\[34\], got f64\[34\] on cpu"),
        ("total_loss_tokens", 3, "total_loss_tokens must count all microbatches"),
        ("spec", LossSpec(kl_coef=0.1), r"kl_coef=0.1 needs ref_logprobs, got None"),
    ):
        given = inputs | {"spec": spec, "temperature": 1.0, "ref_logprobs": None} | {name: value}
        with pytest.raises(ValueError, match=says):
            fused(given, given.pop("spec"), given.pop("temperature"))
