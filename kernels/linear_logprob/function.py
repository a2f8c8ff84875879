"""`linear_logprob` as an autograd.Function over two ops that write their results: the values, and the two
gradients.

The native ops (csrc/linear_logprob) recompute the logits in the backward pass. Triton's ops save softmax(z)
in bf16 if it fits SOFTMAX_BYTES, which spares that product: 6NDV flops in all instead of 8NDV.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

SOFTMAX_BYTES = 2 << 30
"""The memory budget of a saved softmax, bf16[N, V]; a larger one is recomputed. The forward results have the
same bits either way."""
SOFTMAX_TILE = 256
"""Vocabulary tokens per tile of the Triton kernel. A saved softmax holds exp(logit - top) with one top per
row and tile."""

Kept = tuple[torch.Tensor, ...]


def no_softmax(hidden: torch.Tensor, weight: torch.Tensor, needs_grad: bool) -> Kept:
    """For ops that save no softmax."""
    return ()


def kept_softmax(hidden: torch.Tensor, weight: torch.Tensor, needs_grad: bool) -> Kept:
    """-> empty (softmax bf16[N, V], tops f32[tiles, N]) for the forward pass to fill; N is 0 if nothing is
    saved."""
    num_rows, vocab_size = hidden.shape[0], weight.shape[0]
    # A narrow head has other tiles and cheap logits; f32 gradients need more digits than a bf16 softmax has.
    is_kept = (needs_grad and hidden.dtype == torch.bfloat16 and vocab_size > 4 * SOFTMAX_TILE
               and num_rows * vocab_size * hidden.element_size() <= SOFTMAX_BYTES)
    num_tiles = -(-vocab_size // SOFTMAX_TILE)
    return (hidden.new_empty(num_rows if is_kept else 0, vocab_size),
            hidden.new_empty(num_tiles, num_rows if is_kept else 0, dtype=torch.float32))


def linear_logprob_by(ops: Any, keep: Callable[..., Kept] = no_softmax) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """The op by `ops`, which has linear_logprob_fwd and linear_logprob_bwd: torch.ops.reason_rl or
    torch.ops.reason_rl_triton."""

    class LinearLogprob(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, target_ids: torch.Tensor, temperature: float, needs_grad: bool
        ) -> tuple[torch.Tensor, torch.Tensor]:
            hidden, weight, target_ids = hidden.contiguous(), weight.contiguous(), target_ids.contiguous()
            num_tokens = hidden.shape[0]
            logprob, entropy, stats = (torch.empty(shape, dtype=torch.float32, device=hidden.device)
                                       for shape in ((num_tokens,), (num_tokens,), (num_tokens, 2)))
            kept = keep(hidden, weight, needs_grad)
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
        needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
        result: tuple[torch.Tensor, torch.Tensor] = LinearLogprob.apply(hidden, weight, target_ids, temperature, needs_grad)
        return result

    return linear_logprob
