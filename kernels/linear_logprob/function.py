"""`linear_logprob` as an autograd.Function over two ops that write their results: forward, and the two gradients of it.

The native ops (csrc/linear_logprob) compute the logits anew in the backward pass. Triton's may keep softmax(z) instead, in bf16,
and spare it the third product: 6NDV flops in all instead of 8NDV, where all of it fits SOFTMAX_BYTES.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

SOFTMAX_BYTES = 2 << 30
"""The memory budget of a kept softmax, bf16[N, V]; a larger one is computed again. The forward's results have the same bits."""
SOFTMAX_TILE = 256
"""Tokens of the vocabulary that share a row's largest logit in a kept softmax: a tile of the Triton kernel's."""

Kept = tuple[torch.Tensor, ...]


def no_softmax(hidden: torch.Tensor, weight: torch.Tensor, is_wanted: bool) -> Kept:
    """For ops that take none."""
    return ()


def kept_softmax(hidden: torch.Tensor, weight: torch.Tensor, is_wanted: bool) -> Kept:
    """-> (exp(logit - its tile's top) bf16[N, V], tops f32[tiles, N]); without rows where they are not kept."""
    num_rows, vocab_size = hidden.shape[0], weight.shape[0]
    # A narrow head has other tiles, and its logits cost little; f32 gradients take more digits than a bf16 softmax has.
    is_kept = (is_wanted and hidden.dtype == torch.bfloat16 and vocab_size > 4 * SOFTMAX_TILE
               and num_rows * vocab_size * hidden.element_size() <= SOFTMAX_BYTES)
    num_tiles = -(-vocab_size // SOFTMAX_TILE)
    return (hidden.new_empty(num_rows if is_kept else 0, vocab_size),
            hidden.new_empty(num_tiles, num_rows if is_kept else 0, dtype=torch.float32))


def linear_logprob_by(ops: Any, keep: Callable[..., Kept] = no_softmax) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """ops: has linear_logprob_fwd and linear_logprob_bwd (torch.ops.reason_rl, torch.ops.reason_rl_triton)."""

    class LinearLogprob(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, target_ids: torch.Tensor, temperature: float, is_wanted: bool
        ) -> tuple[torch.Tensor, torch.Tensor]:
            hidden, weight, target_ids = hidden.contiguous(), weight.contiguous(), target_ids.contiguous()
            num_tokens = hidden.shape[0]
            logprob, entropy, stats = (torch.empty(shape, dtype=torch.float32, device=hidden.device)
                                       for shape in ((num_tokens,), (num_tokens,), (num_tokens, 2)))
            kept = keep(hidden, weight, is_wanted)
            ops.linear_logprob_fwd(logprob, entropy, stats, *kept, hidden, weight, target_ids, temperature)
            ctx.save_for_backward(hidden, weight, target_ids, stats, entropy, *kept)
            ctx.temperature = temperature
            return logprob, entropy

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            hidden, weight, *_ = ctx.saved_tensors
            dhidden = torch.empty_like(hidden)
            dweight = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
            dlogprob, dentropy = (grad.contiguous() for grad in grads)
            ops.linear_logprob_bwd(dhidden, dweight, dlogprob, dentropy, *ctx.saved_tensors, ctx.temperature)
            return dhidden, dweight.to(weight.dtype), None, None, None

    def linear_logprob(
        hidden: torch.Tensor, weight: torch.Tensor, target_ids: torch.Tensor, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        is_wanted = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
        result: tuple[torch.Tensor, torch.Tensor] = LinearLogprob.apply(hidden, weight, target_ids, temperature, is_wanted)
        return result

    return linear_logprob
