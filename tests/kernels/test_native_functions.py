"""All native ops with a gradient: a second derivative raises, and torch's defaults change no result."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from kernels.attention import attention
from kernels.attention import make_inputs as attention_inputs
from kernels.grpo_loss import LossSpec
from kernels.grpo_loss import make_inputs as loss_inputs
from kernels.linear import linear
from kernels.linear import make_inputs as linear_inputs
from kernels.linear_logprob import linear_logprob
from kernels.linear_logprob import make_inputs as logprob_inputs
from kernels.moe import experts, route
from kernels.moe import make_inputs as moe_inputs
from kernels.native import ISA
from kernels.rms_norm import make_inputs as norm_inputs
from kernels.rms_norm import rms_norm
from kernels.rope import make_inputs as rope_inputs
from kernels.rope import rope
from kernels.sample import make_inputs as sample_inputs
from kernels.sample import sample
from kernels.swiglu import make_inputs as swiglu_inputs
from kernels.swiglu import swiglu
from tests.kernels.compare import Tensors, as_tuple, same_bits
from tests.kernels.loss_cases import loss_of as grpo_loss_of

pytestmark = pytest.mark.skipif(not ISA, reason="needs the native library")
F32 = torch.float32


def cases() -> dict[str, tuple[Callable[..., Tensors], list[torch.Tensor]]]:
    moe, loss = moe_inputs(9, 5, 2, 8, 6, F32), loss_inputs()["uneven"]

    def loss_of(logprobs: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
        return grpo_loss_of({**loss, "logprobs": logprobs, "entropy": entropy}, LossSpec(entropy_coef=0.1), "native")[0]

    ops: dict[str, tuple[Callable[..., Tensors], dict[str, torch.Tensor]]] = {
        "attention": (attention, attention_inputs([(0, 6, 0, 0), (6, 7, 0, 6)], 4, 2, 6, F32)),
        "linear": (linear, linear_inputs(9, 5, 7, F32)),
        "linear_logprob": (linear_logprob, logprob_inputs(9, 7, 12, F32)),
        "rms_norm": (rms_norm, norm_inputs((9, 7), F32)),
        "rope": (rope, rope_inputs(9, 2, 6, F32)),
        "swiglu": (swiglu, swiglu_inputs(9, 6, F32)),
        "experts": (experts, {name: moe[name] for name in ("x", "gate_up", "down", "expert_ids", "weights")}),
    }
    return {
        **{name: (partial(op, impl="native"), list(inputs.values())) for name, (op, inputs) in ops.items()},
        "route": (lambda logits: route(logits, 2, impl="native")[1:], [moe["x"]]),
        "grpo_loss": (loss_of, [loss["logprobs"], loss["logprobs"].exp()])}


CASES = cases()


def leaves_of(name: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """New inputs, and those of them that take a gradient (rope's tables do not)."""
    leaves = [x.clone().requires_grad_(x.is_floating_point() and (name != "rope" or x.dim() == 3)) for x in CASES[name][1]]
    return leaves, [leaf for leaf in leaves if leaf.requires_grad]


@pytest.mark.parametrize("name", CASES)
def test_a_second_derivative_is_an_error_and_not_silently_nothing(name: str):
    leaves, wanted = leaves_of(name)
    energy = sum((out.square().sum() for out in as_tuple(CASES[name][0](*leaves))), torch.zeros(()))
    for gradient in torch.autograd.grad(energy, wanted, create_graph=True):
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward(retain_graph=True)


@pytest.mark.parametrize("name", CASES)
def test_torchs_default_dtype_changes_nothing(name: str):
    def results() -> list[torch.Tensor]:
        leaves, wanted = leaves_of(name)
        outs = as_tuple(CASES[name][0](*leaves))
        return [*outs, *torch.autograd.grad(outs, wanted, [torch.ones_like(out) for out in outs])]

    want = results()
    torch.set_default_dtype(torch.float64)
    assert all(map(same_bits, results(), want))


def test_torchs_default_dtype_changes_no_sample():
    inputs = sample_inputs(9, 7, 12, F32)
    want = sample(**inputs, impl="native")
    torch.set_default_dtype(torch.float64)
    assert all(map(same_bits, sample(**inputs, impl="native"), want))
