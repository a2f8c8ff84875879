"""`linear_logprob` by csrc/linear_logprob, as torch.ops.reason_rl.linear_logprob_{fwd,bwd}: the logits are never written out."""

from __future__ import annotations

from typing import Any

import torch

from kernels.native import OPS


class NativeLinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, target_ids: torch.Tensor, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, weight, target_ids = hidden.contiguous(), weight.contiguous(), target_ids.contiguous()
        num_tokens = hidden.shape[0]
        logprob, entropy = (torch.empty(num_tokens) for _ in range(2))
        stats = torch.empty(num_tokens, 2)
        OPS.linear_logprob_fwd(logprob, entropy, stats, hidden, weight, target_ids, temperature)
        ctx.save_for_backward(hidden, weight, target_ids, stats, entropy)
        ctx.temperature = temperature
        return logprob, entropy

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, target_ids, stats, entropy = ctx.saved_tensors
        dhidden, dweight = torch.empty_like(hidden), torch.empty(weight.shape)
        dlogprob, dentropy = (grad.contiguous() for grad in grads)
        OPS.linear_logprob_bwd(
            dhidden, dweight, dlogprob, dentropy, hidden, weight, target_ids, stats, entropy, ctx.temperature)
        return dhidden, dweight.to(weight.dtype), None, None


def linear_logprob_native(
    hidden: torch.Tensor, weight: torch.Tensor, target_ids: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    result: tuple[torch.Tensor, torch.Tensor] = NativeLinearLogprob.apply(hidden, weight, target_ids, temperature)
    return result
