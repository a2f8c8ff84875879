"""A user's surrogate: one function, named in the config or registered. The reference runs it, and prints one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kernels.dispatch import warn_once
from kernels.grpo_loss import OP, SURROGATES, LossInputs, LossSpec, grpo_loss
from kernels.grpo_loss.surrogates import TokenLoss, reinforce
from kernels.linear_grpo_loss import OP as LINEAR_OP
from kernels.linear_grpo_loss import linear_grpo_loss
from kernels.linear_grpo_loss import make_inputs as linear_inputs
from kernels.native import ISA

MODULE = """
import torch

def unclipped(logprobs, ratio, advantages, spec):
    return -ratio * advantages, {}

not_a_function = 3
"""


def squared(logprobs: torch.Tensor, ratio: torch.Tensor, advantages: torch.Tensor, spec: LossSpec) -> TokenLoss:
    """-A (ratio - (ratio - 1)^2 / (2 clip_high)): its slope in the ratio falls to 0 at the bound."""
    return -advantages * (ratio - (ratio - 1).square() / (2 * spec.clip_high)), {"high": ratio > 1 + spec.clip_high}


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registers `squared`, and forgets the choices and messages of earlier tests."""
    monkeypatch.setitem(SURROGATES, "squared", squared)
    for op in (OP, LINEAR_OP):
        op._chosen.clear()
    warn_once.cache_clear()


def inputs_of(logprobs: list[float], advantages: list[float]) -> tuple[torch.Tensor, LossInputs]:
    """One sequence; old_logprobs are 0."""
    n = len(logprobs)
    return torch.tensor(logprobs, requires_grad=True), LossInputs(
        old_logprobs=torch.zeros(n), advantages=torch.tensor(advantages), sequence_index=torch.zeros(n, dtype=torch.int64),
        num_sequences=1, total_loss_tokens=n, total_sequences=1)


def test_a_registered_surrogates_value_gradient_and_clip_count_are_the_functions() -> None:
    logprobs, inputs = inputs_of([0.1, 0.0, -0.2, 0.5], [1.0, -2.0, 0.5, 1.0])
    loss, metrics = grpo_loss(logprobs, inputs, LossSpec(surrogate="squared"))
    ratio = logprobs.detach().double().exp()
    advantages = inputs.advantages.double()
    expected = -(advantages * (ratio - (ratio - 1) ** 2 / 0.4)).mean()
    slope = -advantages * (1 - (ratio - 1) / 0.2) * ratio / 4
    (gradient,) = torch.autograd.grad(loss, logprobs)
    # f32: a few roundings of terms of order 1.
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(gradient.double(), slope, rtol=1e-6, atol=1e-7)
    assert int(metrics["clip_high_sum"]) == 1 and int(metrics["clip_low_sum"]) == 0


def test_through_linear_grpo_loss_a_copy_of_a_built_in_gives_its_loss_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SURROGATES, "copy", reinforce)
    columns = linear_inputs([5, 1, 3], 16, 33, torch.float32)
    head = [columns.pop(name) for name in ("hidden", "weight", "target_ids")]
    results = []
    for name in ("copy", "reinforce"):
        leaves = [x.clone().requires_grad_() for x in head[:2]]
        spec = LossSpec(surrogate=name, importance="tis", kl_coef=0.1)
        loss, metrics, _ = linear_grpo_loss(*leaves, head[2], LossInputs(**columns), spec, 0.8)
        results.append((loss.detach(), torch.autograd.grad(loss, leaves), metrics))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)  # the same f32 terms, added in another order


@pytest.mark.skipif(not ISA, reason="needs a kernel that declines")
def test_one_line_names_the_surrogate_for_any_number_of_ops_calls_and_specs(caplog: pytest.LogCaptureFixture) -> None:
    columns = linear_inputs([4], 16, 33, torch.float32)
    head = [columns.pop(name) for name in ("hidden", "weight", "target_ids")]
    for clip_high in (0.2, 0.3):
        linear_grpo_loss(*head, LossInputs(**columns), LossSpec(surrogate="squared", clip_high=clip_high))
        grpo_loss(*inputs_of([0.1], [1.0]), LossSpec(surrogate="squared", clip_high=clip_high))
    OP._chosen.clear()
    grpo_loss(*inputs_of([0.1], [1.0]), LossSpec(surrogate="squared"))
    assert caplog.messages == ["grpo_loss: no kernel implements 'squared'; the reference runs instead"]


def test_a_built_in_surrogate_prints_nothing(caplog: pytest.LogCaptureFixture) -> None:
    for name in ("clip", "cispo", "reinforce"):
        grpo_loss(*inputs_of([0.1], [1.0]), LossSpec(surrogate=name))
    assert not caplog.messages


@pytest.mark.skipif(not ISA, reason="needs a kernel that declines")
def test_linear_logprob_keeps_its_kernel_when_the_loss_has_none() -> None:
    assert LINEAR_OP.resolve(torch.device("cpu"), torch.float32, "auto", "squared").name == "in_turn"


@pytest.mark.skipif(not ISA, reason="needs a kernel that declines")
def test_an_explicit_kernel_fails_loudly() -> None:
    spec = LossSpec(surrogate="squared")
    with pytest.raises(ValueError, match="grpo_loss: impl='native' cannot run on cpu: does not implement 'squared'"):
        grpo_loss(*inputs_of([0.1], [1.0]), spec, impl="native")
    columns = linear_inputs([4], 16, 33, torch.float32)
    head = [columns.pop(name) for name in ("hidden", "weight", "target_ids")]
    with pytest.raises(ValueError, match="linear_grpo_loss: impl='native' cannot run on cpu: does not implement 'squared'"):
        linear_grpo_loss(*head, LossInputs(**columns), spec, impl="native")


def test_module_and_function_name_a_surrogate_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_unclipped_loss.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    logprobs, inputs = inputs_of([0.5, -0.5], [1.0, -1.0])
    loss, _ = grpo_loss(logprobs, inputs, LossSpec(surrogate="my_unclipped_loss:unclipped"))
    torch.testing.assert_close(loss.detach(), -(inputs.advantages * logprobs.detach().exp()).mean())


def test_a_name_that_is_not_a_surrogate_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_second_loss.py").write_text(MODULE)
    (tmp_path / "my_broken_loss.py").write_text("import no_such_module_of_mine")
    monkeypatch.chdir(tmp_path)
    for name, words in (
        ("clp", r"loss.surrogate must be one of \['clip', 'cispo', 'reinforce', 'squared'\] or 'module:function', got 'clp'"),
        ("nowhere_to_be_found:f", "there is no module 'nowhere_to_be_found'"),
        ("my_second_loss:absent", "module 'my_second_loss' has no function 'absent'"),
        ("my_second_loss:not_a_function", "has no function 'not_a_function'"),
    ):
        with pytest.raises(ValueError, match=words):
            LossSpec(surrogate=name)
    with pytest.raises(ModuleNotFoundError, match="no_such_module_of_mine"):  # the user's own error, with its traceback
        LossSpec(surrogate="my_broken_loss:f")
