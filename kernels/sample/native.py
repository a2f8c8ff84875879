"""`sample` by csrc/sample, as torch.ops.reason_rl.sample; the whole decode step calls the same rows (csrc/sample/rows.h)."""

from __future__ import annotations

import torch

from kernels.native import OPS


def sample_native(
    hidden: torch.Tensor, weight: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor,
    temperature: float, top_k: int, top_p: float, min_p: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    num_rows = hidden.shape[0]
    token, logprob, kept_logmass = (
        torch.empty(num_rows, dtype=dtype, device=hidden.device) for dtype in (torch.int64, torch.float32, torch.float32))
    inputs = (tensor.contiguous() for tensor in (hidden, weight, keys, positions))
    try:
        OPS.sample(token, logprob, kept_logmass, *inputs, temperature, top_k, top_p, min_p)
    except RuntimeError as error:
        if "hold NaN or inf" not in str(error):
            raise
        raise ValueError(str(error).splitlines()[0]) from None
    return token, logprob, kept_logmass
