"""`sample`: from the last hidden states to one token per row, its logprob, and the log of the mass that
truncation kept.

    z[r, v] = sum_d hidden[r, d] * weight[v, d] / temperature
    token   = argmax over the kept v of z[r, v] + gumbel[r, v]       (Gumbel-max: a draw from softmax(z))
    logprob = z[token] - logsumexp_v z      over the FULL vocabulary, with the same bits as `linear_logprob`
    kept_logmass = log sum of softmax(z) over the kept v; logprob - kept_logmass is the truncated policy's

The noise is counter-based (philox.py): its key is (keys[r], positions[r], v), so that a row draws the same
token in any batch. temperature = 0 is greedy (ties by index), with the logprob at temperature 1. NaN or
infinite logits raise. Triton on a GPU would have to sync for that: the row's token is -1 instead, and the
reader of the tokens calls `check_tokens`.
Flops: 2RDV. Bytes moved: VD * itemsize for small R. Not differentiable. To truncate, the native kernel pops
the likeliest tokens from a heap, and Triton's finds the last kept token by histograms. Both first compute the
noise in f32, with a bounded error, and take f64 logs of only the few tokens that can still win. Their token
may differ from the reference's if logits differ in the last bit, or if two scores do.
Siblings: reference.py, philox.py, function.py and triton_*.py here, csrc/sample/,
tests/kernels/test_sample.py.
"""

from __future__ import annotations

import torch

from kernels import triton_ops
from kernels.checks import FLOATS, check
from kernels.dispatch import Implementation, Op
from kernels.native import DTYPES, OPS, cpu_unsupported_reason, cuda_unsupported_reason
from kernels.sample.cuda import sample_cuda
from kernels.sample.function import check_tokens, sample_by
from kernels.sample.reference import make_inputs, sample_reference

__all__ = ["check_tokens", "make_inputs", "sample"]

triton_ops.register("sample", {
    "sample": "(Tensor(a!) token, Tensor(b!) logprob, Tensor(c!) kept_logmass, Tensor hidden, Tensor weight, Tensor keys, "
              "Tensor positions, float temperature, int top_k, float top_p, float min_p) -> ()"})
OP = Op("sample", (
    Implementation("native", sample_by(OPS), cpu_unsupported_reason, DTYPES),
    Implementation("triton", sample_by(triton_ops.OPS), triton_ops.unsupported_reason, triton_ops.DTYPES),
    Implementation("cuda", sample_cuda, cuda_unsupported_reason, DTYPES, is_automatic=False),
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
