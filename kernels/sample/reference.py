"""The specification of `sample`: logits, truncation by a stable sort, and the Gumbel-max trick with
counter-based noise."""

from __future__ import annotations

import torch

from kernels.linear_logprob.reference import row_sum, scaled_logits
from kernels.sample.function import BROKEN
from kernels.sample.philox import gumbel


def truncation_mask(logprobs: torch.Tensor, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    """logprobs [R, V] -> bool[R, V]: the kept tokens. The likeliest token is always kept; equal ones rank by
    index.

    Each of the three limits applies to the full distribution, and a token is kept if all three keep it.
    """
    ordered, index = torch.sort(logprobs, dim=-1, descending=True, stable=True)
    rank = torch.arange(logprobs.shape[1], device=logprobs.device)
    keep = torch.ones_like(ordered, dtype=torch.bool)
    if top_k:
        keep &= rank < top_k
    if top_p < 1:
        mass = ordered.double().exp()
        keep &= mass.cumsum(-1) - mass < top_p  # the mass before this token is below top_p
    if min_p > 0:
        keep &= ordered >= ordered[:, :1] + torch.log(torch.tensor(min_p, dtype=ordered.dtype))
    keep[:, 0] = True
    return torch.zeros_like(keep).scatter_(1, index, keep)


def sample_reference(
    hidden: torch.Tensor, weight: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor,
    temperature: float, top_k: int, top_p: float, min_p: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> (token i64[R], logprob f32[R], kept_logmass f32[R])."""
    # Logits of the full vocabulary.
    logits, log_sum = scaled_logits(hidden, weight, temperature or 1.0)
    finite = torch.isfinite(logits).all(-1)
    if not finite.all():
        raise ValueError(BROKEN.format(int((~finite).nonzero()[0])))
    # Truncation.
    kept_logmass = torch.zeros_like(log_sum)
    scores = logits
    if temperature and (top_k or top_p < 1 or min_p > 0):
        logprobs = logits - log_sum[:, None]
        keep = truncation_mask(logprobs, top_k, top_p, min_p)
        kept = row_sum(torch.where(keep, logprobs, -torch.inf).double().exp()).log().to(log_sum.dtype)
        # If all tokens are kept the result must be exactly 0, not the rounding of a sum.
        kept_logmass = torch.where(keep.all(-1), 0.0, kept.clamp(max=0.0))
        scores = torch.where(keep, logits, -torch.inf)
    # The draw.
    if temperature:
        scores = scores + gumbel(keys, positions, logits.shape[1])
    token = scores.argmax(-1)
    logprob = logits.gather(1, token[:, None]).squeeze(1) - log_sum
    return token, logprob, kept_logmass


def make_inputs(
    num_rows: int, hidden_size: int, vocab_size: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0
) -> dict[str, torch.Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    hidden = torch.randn(num_rows, hidden_size, generator=generator, device=device)
    weight = torch.randn(vocab_size, hidden_size, generator=generator, device=device) * 2 / hidden_size**0.5
    keys = torch.randint(2**62, (num_rows,), generator=generator, device=device)
    positions = torch.arange(num_rows, device=device)
    return {"hidden": hidden.to(dtype), "weight": weight.to(dtype), "keys": keys, "positions": positions}
