"""`sample`: from the last hidden states to one token a row, its logprob, and the log of the mass that truncation kept.

    z[r, v] = sum_d hidden[r, d] * weight[v, d] / temperature
    token   = argmax over the kept v of z[r, v] + gumbel[r, v]              (Gumbel-max: a draw from softmax(z) of the kept)
    logprob = z[token] - logsumexp_v z          over the FULL vocabulary, the very bits that `linear_logprob` gives
    kept_logmass = log sum of softmax(z) over the kept v; the truncated policy's logprob is logprob - kept_logmass

The noise is counter-based (philox.py): keyed by (keys[r], positions[r], v), so that a row draws the same token in any
batch. temperature = 0 is greedy (ties by index), with the logprob at temperature 1. NaN or infinite logits raise.
Flops: 2RDV; bytes: VD * itemsize for small R. Not differentiable.
The native kernel takes the likeliest tokens off a heap, and the noise in f32 with a known error first: the f64 logs are left to the
few tokens that can still win. Its token can differ from the reference's where their logits differ in a last bit.
Siblings: reference.py, philox.py and native.py here, csrc/sample/, tests/kernels/test_sample.py.
"""

from __future__ import annotations

import torch

from kernels.checks import FLOATS, check
from kernels.dispatch import Implementation, Op
from kernels.native import DTYPES, cpu_why_not, cuda_why_not
from kernels.sample.cuda import sample_cuda
from kernels.sample.native import sample_native
from kernels.sample.reference import make_inputs, sample_reference

__all__ = ["make_inputs", "sample"]

OP = Op("sample", (
    Implementation("native", sample_native, cpu_why_not, DTYPES),
    Implementation("cuda", sample_cuda, cuda_why_not, DTYPES, is_automatic=False),
    Implementation("reference", sample_reference)))


@torch.no_grad()
def sample(
    hidden: torch.Tensor, weight: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor, *,
    temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden: float[R, D], weight: float[V, D] of the same dtype or f32, keys and positions: i64[R]
    -> (token i64[R], logprob f32[R], kept_logmass f32[R])."""
    check("sample", "hidden", hidden, ("R", "D"), FLOATS)
    check("sample", "weight", weight, ("V", hidden.shape[1]), (hidden.dtype, torch.float32), like=hidden)
    check("sample", "keys", keys, (hidden.shape[0],), torch.int64, like=hidden)
    check("sample", "positions", positions, (hidden.shape[0],), torch.int64, like=hidden)
    if not temperature >= 0 or top_k < 0 or not 0 < top_p <= 1 or not 0 <= min_p <= 1:
        raise ValueError("sample: needs temperature >= 0, top_k >= 0, 0 < top_p <= 1, 0 <= min_p <= 1, "
                         f"got {temperature}, {top_k}, {top_p}, {min_p}")
    result: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = OP.choose(hidden, impl).run(
        hidden, weight, keys, positions, temperature, top_k, top_p, min_p)
    return result
