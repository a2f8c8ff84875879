"""A loss: SAPO (arXiv:2511.20347) replaces the clip of the ratio r by a smooth gate with a temperature t.

    .venv/bin/python train.py examples/losses/sapo.toml

    loss = -gate(r) A,    gate(r) = sigmoid(t (r - 1)) 4 / t,    t = 1.0 if A > 0 else 1.05

At r = 1 the gate has slope 1, so the gradient of an on-policy token is that of -r A. Farther from 1 it fades,
but unlike a clip's it never becomes 0.

A surrogate is one function, named in the config as "module:function". No kernel implements this one, so the
reference loss runs, and one line says so.
"""

from __future__ import annotations

import torch

from kernels.grpo_loss import LossSpec

TEMPERATURE, TEMPERATURE_OF_NEGATIVE = 1.0, 1.05
"""The paper's. The larger one makes the gradients of tokens with a negative advantage fade faster."""


def sapo(
    logprobs: torch.Tensor, ratio: torch.Tensor, advantages: torch.Tensor, spec: LossSpec
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """f32[N] each -> (the loss of each token f32[N], the tokens that a clip changes: none)."""
    temperature = torch.full_like(advantages, TEMPERATURE_OF_NEGATIVE).masked_fill(advantages > 0, TEMPERATURE)
    gate = torch.sigmoid(temperature * (ratio - 1)) * 4 / temperature
    return -gate * advantages, {}
