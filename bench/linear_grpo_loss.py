"""`linear_grpo_loss` (kernels/linear_grpo_loss/), hidden states to gradients, against torch and Liger.

Only `full` is timed: an implementation with the loss folded in computes the gradients in its forward pass.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F

from bench.cases import Case, Inputs, Setup, Side
from bench.peers.ops import liger_grpo
from bench.suite import main
from kernels.grpo_loss import LossInputs, LossSpec
from kernels.linear_grpo_loss import linear_grpo_loss
from kernels.linear_logprob import linear_logprob, make_inputs

BF16, F32 = torch.bfloat16, torch.float32
SHAPES = {"numbers": [((16, 512, 4096, 131072), BF16)], "small": [((64, 64, 128, 64), BF16)], "tiny": [((2, 5, 12, 33), F32)]}
"""(sequences, tokens of each, D, V)"""
SPEC = LossSpec()
MOST_CHECKED = 512


def draw(num_sequences: int, length: int, d: int, v: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Old logprobs near the current ones, as after a few updates, so that some tokens are clipped."""
    inputs: Inputs = make_inputs(num_sequences * length, d, v, dtype, str(device))
    generator = torch.Generator(device).manual_seed(3)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device)
    with torch.no_grad():
        logprobs = linear_logprob(inputs["hidden"], inputs["weight"], inputs["target_ids"])[0]
    index = torch.arange(num_sequences, dtype=torch.int32, device=device).repeat_interleave(length)
    return inputs | {
        "old_logprobs": logprobs + 0.1 * normal(len(logprobs)), "advantages": normal(num_sequences).index_select(0, index),
        "sequence_index": index}


def fused(hidden: torch.Tensor, weight: torch.Tensor, target_ids: torch.Tensor, num_sequences: int, impl: str, **rest: Any) -> Any:
    inputs = LossInputs(num_sequences=num_sequences, total_loss_tokens=len(target_ids), total_sequences=num_sequences, **rest)
    return linear_grpo_loss(hidden, weight, target_ids, inputs, SPEC, impl=impl)[0]


def by_torch(
    hidden: torch.Tensor, weight: torch.Tensor, target_ids: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor,
    **rest: Any,
) -> torch.Tensor:
    """Without our kernels; the logits are rounded to hidden's dtype."""
    logprobs = -F.cross_entropy(F.linear(hidden, weight).float(), target_ids, reduction="none")
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1 - SPEC.clip_low, 1 + SPEC.clip_high)
    return -torch.minimum(ratio * advantages, clipped * advantages).mean()


def cases(setup: Setup) -> list[Case]:
    found = []
    for (sequences, length, d, v), dtype in setup.pick(SHAPES):
        n = sequences * length
        shorter = max(1, min(length, MOST_CHECKED // sequences))
        fixed = {"num_sequences": sequences}
        exact = functools.partial(fused, **fixed, impl="reference")
        ours = setup.ours("linear_grpo_loss", functools.partial(fused, **fixed), dtype)
        found.append(Case(
            op="linear_grpo_loss", shape=f"N{n} D{d} V{v}", dtype=dtype, wanted=("hidden", "weight"), directions=("full",),
            exact=exact, make=functools.partial(draw, sequences, length, d, v, dtype, setup.device),
            check=functools.partial(draw, sequences, shorter, d, v, dtype, setup.device),
            sides={**ours, "eager": Side(by_torch), **setup.compiled(by_torch),
                   "liger-kernel": liger_grpo(setup.device, sequences, SPEC.clip_low, SPEC.clip_high)},
            work={"full": (6 * n * d * v, dtype.itemsize * 3 * (n * d + v * d))}))
    return found


if __name__ == "__main__":
    main("linear_grpo_loss", cases)
