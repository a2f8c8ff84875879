"""`sample` over one op that writes its three results: csrc/sample's or Triton's. The native decode step calls
the same C++ function for its rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

Drawn = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
BROKEN = "sample: the logits of row {} hold NaN or inf; the weights or the hidden states are broken"


def check_tokens(tokens: Sequence[int]) -> None:
    """Raises ValueError for a token of -1, with which a GPU marks a row of NaN or infinite logits."""
    for row, token in enumerate(tokens):
        if token < 0:
            raise ValueError(BROKEN.format(row))


def sample_by(ops: Any) -> Callable[..., Drawn]:
    """The op by `ops.sample`; ops: torch.ops.reason_rl or torch.ops.reason_rl_triton."""

    def sample(
        hidden: torch.Tensor, weight: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor,
        temperature: float, top_k: int, top_p: float, min_p: float,
    ) -> Drawn:
        num_rows = hidden.shape[0]
        token, logprob, kept_logmass = (
            torch.empty(num_rows, dtype=dtype, device=hidden.device) for dtype in (torch.int64, torch.float32, torch.float32))
        inputs = (tensor.contiguous() for tensor in (hidden, weight, keys, positions))
        try:
            ops.sample(token, logprob, kept_logmass, *inputs, temperature, top_k, top_p, min_p)
        except RuntimeError as error:
            if "hold NaN or inf" not in str(error):
                raise
            raise ValueError(str(error).splitlines()[0]) from None
        return token, logprob, kept_logmass

    return sample
