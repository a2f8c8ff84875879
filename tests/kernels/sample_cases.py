"""Inputs of `sample` with exact logits, logits that make its truncation hard, and the reference's results."""

from __future__ import annotations

import torch

from kernels.sample.reference import sample_reference

Drawn = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

# top_p is below 1 by more than the log-sum's rounding (1e-6), which would otherwise decide the kept set.
OPTIONS = [
    {}, {"top_k": 1}, {"top_k": 3}, {"top_k": 10_000_000}, {"top_p": 1e-9}, {"top_p": 0.3}, {"top_p": 0.9}, {"top_p": 0.999},
    {"min_p": 0.01}, {"min_p": 0.5}, {"min_p": 1.0}, {"top_k": 7, "top_p": 0.8}, {"top_k": 40, "top_p": 0.95, "min_p": 0.02},
    {"temperature": 0.0}, {"temperature": 0.6, "top_p": 0.95}, {"temperature": 1.7, "top_k": 20}, {"temperature": 0.0, "top_k": 2},
]
KINDS = ("random", "ties", "all_equal", "peaked", "wide", "steps")


def make_logits(kind: str, num_rows: int, vocab: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(num_rows, vocab, generator=generator)
    if kind == "ties":  # a few values, each of them many times
        return (noise * 1.5).round()
    if kind == "all_equal":
        return torch.full((num_rows, vocab), -3.25)
    if kind == "peaked":  # one token with nearly all of the mass
        noise[torch.arange(num_rows), torch.randint(vocab, (num_rows,), generator=generator)] += 30
    if kind == "wide":  # masses from 1 down to 0
        return noise * 60
    if kind == "steps":  # a rising row: the likeliest tokens come last
        return torch.arange(vocab).float().expand(num_rows, vocab) * (20 / vocab)
    return noise * 3


def exact_inputs(num_rows: int, hidden_size: int, vocab_size: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Eighths and quarters, whose products and sums are exact in any order: every implementation has the same logits."""
    generator = torch.Generator().manual_seed(num_rows + vocab_size)
    hidden = torch.randint(-8, 9, (num_rows, hidden_size), generator=generator) / 8
    weight = torch.randint(-8, 9, (vocab_size, hidden_size), generator=generator) / 4
    keys = torch.randint(-(2**63), 2**63 - 1, (num_rows,), generator=generator)
    positions = torch.randint(0, 2**40, (num_rows,), generator=generator)
    return {"hidden": hidden.to(dtype), "weight": weight.to(dtype), "keys": keys, "positions": positions}


def make_noise(num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(2**62, (num_rows,), generator=generator) * 2 - 2**61, torch.arange(num_rows) * 3 + 5


def reference(logits: torch.Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Drawn:
    """One hidden state for each row, and the rows as weight: the product is exactly these logits."""
    keys, positions = make_noise(logits.shape[0])
    return sample_reference(torch.eye(logits.shape[0]), logits.T.contiguous(), keys, positions, temperature, top_k, top_p, min_p)


def assert_drawn_alike(got: Drawn, want: Drawn) -> None:
    """The same tokens. Another order of the sum changes its log by 1e-6 of it (at most 12), and so the logprobs."""
    assert torch.equal(got[0], want[0]), f"{int((got[0] != want[0]).sum())} of {len(want[0])} tokens differ"
    for name, mine, theirs in zip(("logprob", "kept_logmass"), got[1:], want[1:], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=4e-6, msg=lambda text, name=name: f"{name}: {text}")
    assert (got[2] <= 0).all()
