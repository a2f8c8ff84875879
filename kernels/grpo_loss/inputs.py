"""`LossInputs`: the constants of grpo_loss, i.e. everything but the logprobs and entropy that gradients flow
through."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LossInputs:
    """One microbatch of N loss tokens in S sequences (completions). f32 tensors may be f64 if all are,
    logprobs too.

    Two completions of 2 and 3 tokens, in a batch of 4 completions and 12 tokens over all microbatches and
    ranks:

        LossInputs(old_logprobs=tensor([-0.1, -1.2, -0.7, -0.1, -2.0]),
                   advantages=tensor([1.0, 1.0, -0.5, -0.5, -0.5]),
                   sequence_index=tensor([0, 0, 1, 1, 1]), num_sequences=2,
                   total_loss_tokens=12, total_sequences=4)
    """

    old_logprobs: torch.Tensor
    """f32[N], nats: of the policy that the ratio divides by."""
    advantages: torch.Tensor
    """f32[N]. From one advantage per sequence: `advantages.index_select(0, sequence_index)`."""
    sequence_index: torch.Tensor
    """i32|i64[N], ascending in 0..S-1: each token's sequence. Its values are checked on the CPU only, since
    on a GPU the check would sync; there the Triton kernel gives a NaN loss for an index out of range."""
    num_sequences: int
    """S. A sequence lies whole in one microbatch; one without tokens adds nothing but to the denominator."""
    total_loss_tokens: int
    """Loss tokens of all microbatches and ranks."""
    total_sequences: int
    """Sequences of all microbatches and ranks."""
    rollout_logprobs: torch.Tensor | None = None
    """f32[N], nats: of the sampler, for `importance` and the gap metrics."""
    ref_logprobs: torch.Tensor | None = None
    """f32[N], nats: of the frozen reference policy, for the KL penalty."""
