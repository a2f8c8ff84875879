"""The surrogates of grpo_loss: name -> the function that turns ratios and advantages into a loss per token.

A new surrogate is one function. The config names it "module:function", with no other change:

    # my_loss.py                                        # my_loss.toml
    def unclipped(logprobs, ratio, advantages, spec):   [loss]
        return -ratio * advantages, {}                  surrogate = "my_loss:unclipped"

or Python registers it under a short name: `SURROGATES["unclipped"] = unclipped`. The reference runs every
surrogate; the kernels implement those in spec.CHOICES and decline the rest.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from kernels.grpo_loss.spec import LossSpec

TokenLoss = tuple[torch.Tensor, dict[str, torch.Tensor]]
"""(loss f32[N] before importance weights and normalizer, {"low" | "high" | "dual": bool[N], the tokens that
this clip changes}). A clip that is left out counts as 0 tokens."""
Surrogate = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, "LossSpec"], TokenLoss]
"""(logprobs f32[N], ratio f32[N], advantages f32[N], spec) -> TokenLoss. Gradients flow through logprobs and
ratio."""


class SpecError(ValueError):
    """A choice of the loss that does not exist or is out of range; errors of a user's module are not among them."""


def clip(logprobs: torch.Tensor, ratio: torch.Tensor, advantages: torch.Tensor, spec: LossSpec) -> TokenLoss:
    """-min(ratio A, clip(ratio) A), PPO arXiv:1707.06347 eq. 7; with dual_clip c, where A < 0, at most -c
    A."""
    low, high = 1 - spec.clip_low, 1 + spec.clip_high
    objective = torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    # The pessimistic min binds only where the clip makes the objective smaller.
    clips = {"low": (ratio < low) & (advantages < 0), "high": (ratio > high) & (advantages > 0)}
    if spec.dual_clip:
        floor = spec.dual_clip * advantages
        clips["dual"] = (advantages < 0) & (objective < floor)
        objective = torch.where(clips["dual"], floor, objective)
    return -objective, clips


def cispo(logprobs: torch.Tensor, ratio: torch.Tensor, advantages: torch.Tensor, spec: LossSpec) -> TokenLoss:
    """-stop_gradient(clip(ratio)) A logprob, MiniMax-M1 arXiv:2506.13585 eq. 4 and 5."""
    low, high = 1 - spec.clip_low, 1 + spec.clip_high
    token_loss = -ratio.detach().clamp(low, high) * advantages * logprobs
    return token_loss, {"low": (ratio < low) & (advantages != 0), "high": (ratio > high) & (advantages != 0)}


def reinforce(logprobs: torch.Tensor, ratio: torch.Tensor, advantages: torch.Tensor, spec: LossSpec) -> TokenLoss:
    """-A logprob, RLOO arXiv:2402.14740."""
    return -advantages * logprobs, {}


SURROGATES: dict[str, Surrogate] = {"clip": clip, "cispo": cispo, "reinforce": reinforce}


def find_surrogate(name: str) -> Surrogate:
    """SURROGATES[name], or the function of "module:function". An exception inside that module keeps its
    traceback."""
    if name in SURROGATES:
        return SURROGATES[name]
    module_name, _, function_name = name.partition(":")
    if not (module_name and function_name):
        raise SpecError(f"loss.surrogate must be one of {list(SURROGATES)} or 'module:function', got {name!r}")
    if "" not in sys.path:
        sys.path.insert(0, "")  # the current folder: Python searches the folder of the started script instead
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # Only a missing `module_name` is an error of the config; a missing import inside it is the module's.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise SpecError(f"loss.surrogate={name!r}: there is no module {module_name!r}") from error
    surrogate: Surrogate | None = getattr(module, function_name, None)
    if not callable(surrogate):
        raise SpecError(f"loss.surrogate={name!r}: module {module_name!r} has no function {function_name!r}")
    return surrogate
