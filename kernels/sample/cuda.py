"""`sample` by csrc/sample/cuda.cu: f32 logits of as many rows as fit CHUNK_BYTES, then one thread block per
row, without a sort.

Runs only under impl="cuda"; it is kept until a GPU has measured it against Triton's sampler, then the slower
one goes.
"""

from __future__ import annotations

import torch

from kernels.native import OPS
from kernels.sample.function import BROKEN

CHUNK_BYTES = 1 << 28


def logits_of(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """hidden [R, D] @ weight [V, D]^T in f32; bf16 products are summed in f32 and never rounded to bf16."""
    weight = weight.to(hidden.dtype)
    if hidden.dtype == torch.float32:
        return hidden @ weight.t()
    return torch.mm(hidden, weight.t(), out_dtype=torch.float32)


def sample_cuda(
    hidden: torch.Tensor, weight: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor,
    temperature: float, top_k: int, top_p: float, min_p: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> (token i64[R], logprob f32[R], kept_logmass f32[R])."""
    num_rows, keys, positions = hidden.shape[0], keys.contiguous(), positions.contiguous()
    token, logprob = keys.new_empty(num_rows), hidden.new_empty(num_rows, dtype=torch.float32)
    kept_logmass, is_broken = torch.empty_like(logprob), keys.new_empty(num_rows, dtype=torch.bool)
    step = max(1, CHUNK_BYTES // (4 * weight.shape[0]))
    with torch.cuda.device(hidden.device):
        stream = torch.cuda.current_stream().cuda_stream
        for first in range(0, num_rows, step):
            chunk = slice(first, first + step)
            OPS.sample_cuda(
                token[chunk], logprob[chunk], kept_logmass[chunk], is_broken[chunk], logits_of(hidden[chunk], weight),
                keys[chunk], positions[chunk], temperature, top_k, top_p, min_p, stream)
    if is_broken.any():
        raise ValueError(BROKEN.format(int(is_broken.nonzero()[0])))
    return token, logprob, kept_logmass
