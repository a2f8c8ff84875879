"""`linear_logprob` by csrc/linear_logprob, as torch.ops.reason_rl.linear_logprob_{fwd,bwd}: the logits are never written out."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from kernels.native import OPS


class NativeLinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, target_ids: torch.Tensor, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, weight, target_ids = hidden.contiguous(), weight.contiguous(), target_ids.contiguous()
        num_tokens = hidden.shape[0]
        logprob, entropy, stats = (torch.empty(shape, dtype=torch.float32, device=hidden.device)
                                   for shape in ((num_tokens,), (num_tokens,), (num_tokens, 2)))
        OPS.linear_logprob_fwd(logprob, entropy, stats, hidden, weight, target_ids, temperature)
        ctx.save_for_backward(hidden, weight, target_ids, stats, entropy)
        ctx.temperature = temperature
        return logprob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, target_ids, stats, entropy = ctx.saved_tensors
        dhidden = torch.empty_like(hidden)
        dweight = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
        dlogprob, dentropy = (grad.contiguous() for grad in grads)
        OPS.linear_logprob_bwd(
            dhidden, dweight, dlogprob, dentropy, hidden, weight, target_ids, stats, entropy, ctx.temperature)
        return dhidden, dweight.to(weight.dtype), None, None


def linear_logprob_native(
    hidden: torch.Tensor, weight: torch.Tensor, target_ids: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    result: tuple[torch.Tensor, torch.Tensor] = NativeLinearLogprob.apply(hidden, weight, target_ids, temperature)
    return result
