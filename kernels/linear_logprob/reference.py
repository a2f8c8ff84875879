"""The specification of `linear_logprob`: all logits at once, in f32."""

from __future__ import annotations

from collections.abc import Callable

import torch

from kernels.linear.reference import linear_reference, linear_torch

Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def scaled_logits(
    hidden: torch.Tensor, weight: torch.Tensor, temperature: float, product: Product = linear_reference
) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden [N, D], weight [V, D] -> (logits / temperature minus the row's largest f32[N, V], log of the sum
    of their exp f32[N]).

    A token's logprob is the difference of the two. Subtracting the largest first keeps the digits of logits
    of 1e4. `sample` calls this too, so that both ops give a token's logprob the same bits.
    """
    weight = weight.to(hidden.dtype)
    if hidden.dtype != torch.float64:
        hidden, weight = hidden.float(), weight.float()  # a bf16 product would round the logits to 8 bits
    logits = product(hidden, weight) / temperature
    shifted = logits - logits.detach().amax(-1, keepdim=True)
    # The log in f64: on the CPU log's rounding in f32 may differ by position in the batch.
    return shifted, row_sum(torch.exp(shifted)).double().log().to(logits.dtype)


def row_sum(x: torch.Tensor) -> torch.Tensor:
    """x [N, V] -> [N]. Duplicates a single row: torch splits a one-output sum over threads."""
    return x.sum(-1) if x.shape[0] != 1 else torch.cat((x, x)).sum(-1)[:1]


def linear_logprob_reference(
    hidden: torch.Tensor, weight: torch.Tensor, target_ids: torch.Tensor, temperature: float, product: Product = linear_reference
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> (logprob f32[N], entropy f32[N])."""
    logits, log_sum = scaled_logits(hidden, weight, temperature, product)
    logprob = logits.gather(1, target_ids[:, None]).squeeze(1) - log_sum
    probability = torch.exp(logits - log_sum[:, None])
    entropy = log_sum - row_sum(probability * logits)
    return logprob, entropy


def linear_logprob_torch(
    hidden: torch.Tensor, weight: torch.Tensor, target_ids: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same with torch's own GEMM: not batch-invariant."""
    return linear_logprob_reference(hidden, weight, target_ids, temperature, linear_torch)


def make_inputs(
    num_tokens: int, hidden_size: int, vocab_size: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0
) -> dict[str, torch.Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    hidden = torch.randn(num_tokens, hidden_size, generator=generator, device=device)
    weight = torch.randn(vocab_size, hidden_size, generator=generator, device=device) * 2 / hidden_size**0.5
    target_ids = torch.randint(vocab_size, (num_tokens,), generator=generator, device=device)
    return {"hidden": hidden.to(dtype), "weight": weight.to(dtype), "target_ids": target_ids}
