"""`grpo_loss` (kernels/grpo_loss/), clip-higher with TIS weights: one pass over a few f32 per token."""

from __future__ import annotations

import functools
from typing import Any

import torch

from bench.cases import Case, Inputs, Setup
from bench.suite import main
from kernels.grpo_loss import LossInputs, LossSpec, grpo_loss, make_inputs

SHAPES = {"numbers": [("large", "token"), ("large", "sequence")], "small": [("step", "token"), ("step", "sequence")],
          "tiny": [("uneven", "token"), ("uneven", "sequence")]}
"""(inputs, level of the ratio)"""
UNUSED = ("ref_logprobs", "entropy")


def draw(name: str, device: torch.device) -> Inputs:
    return {key: value for key, value in make_inputs(device)[name].items() if key not in UNUSED}


def loss_alone(impl: str, spec: LossSpec, logprobs: torch.Tensor, **inputs: Any) -> torch.Tensor:
    return grpo_loss(logprobs, LossInputs(**inputs), spec, impl=impl)[0]


def cases(setup: Setup) -> list[Case]:
    found = []
    for name, level in setup.pick(SHAPES):
        spec = LossSpec(ratio=level, clip_high=0.28, importance="tis")
        call = functools.partial(loss_alone, spec=spec)
        n = sum(draw(name, torch.device("cpu"))["logprobs"].shape)
        found.append(Case(
            op="grpo_loss", shape=f"{name} N{n}, ratio by {level}", dtype=torch.float32, wanted=("logprobs",),
            exact=functools.partial(call, impl="reference"), make=functools.partial(draw, name, setup.device),
            sides={**setup.ours("grpo_loss", call, torch.float32), **setup.compiled(functools.partial(call, impl="reference"))},
            # Per token, forward reads four f32 and an index and writes the gradient; backward scales it.
            work={"forward": (0, 24 * n), "backward": (0, 8 * n)}))
    return found


if __name__ == "__main__":
    main("grpo_loss", cases)
