"""The specification of `linear_logprob`: the logits written out, in float32."""

from __future__ import annotations

import torch

from kernels.linear import linear


def scaled_logits(hidden: torch.Tensor, weight: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden [N, D], weight [V, D] -> (logits / temperature f32[N, V], their logsumexp f32[N]).

    `sample` calls this too: the two then agree on every bit of a token's logprob.
    """
    logits = linear(hidden, weight)
    logits = (logits if logits.dtype == torch.float64 else logits.float()) / temperature
    top = logits.detach().amax(-1, keepdim=True)
    # The last log in float64: log's own rounding on the CPU may differ by position in a batch, and this hides it.
    logsumexp = torch.exp(logits - top).sum(-1).double().log().to(logits.dtype) + top.squeeze(-1)
    return logits, logsumexp


def linear_logprob_reference(
    hidden: torch.Tensor, weight: torch.Tensor, target_ids: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> (logprob f32[N], entropy f32[N])."""
    logits, logsumexp = scaled_logits(hidden, weight, temperature)
    logprob = logits.gather(1, target_ids[:, None]).squeeze(1) - logsumexp
    probability = torch.exp(logits - logsumexp[:, None])
    entropy = logsumexp - (probability * logits).sum(-1)
    return logprob, entropy


def make_inputs(
    num_tokens: int, hidden_size: int, vocab_size: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0
) -> dict[str, torch.Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    hidden = torch.randn(num_tokens, hidden_size, generator=generator, device=device)
    weight = torch.randn(vocab_size, hidden_size, generator=generator, device=device) * 2 / hidden_size**0.5
    target_ids = torch.randint(vocab_size, (num_tokens,), generator=generator, device=device)
    return {"hidden": hidden.to(dtype), "weight": weight.to(dtype), "target_ids": target_ids}
