"""The specification of `linear`: torch's own GEMM, in blocks of rows so that a row's bits do not depend on
its batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels.products import linear_in_blocks


def linear_reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [M, K] @ weight [N, K]^T -> [M, N] in x's dtype."""
    return linear_in_blocks(x, weight.to(x.dtype))


def linear_torch(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """torch's own GEMM: not batch-invariant."""
    return F.linear(x, weight.to(x.dtype))


def make_inputs(
    num_rows: int, out_size: int, in_size: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0
) -> dict[str, torch.Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(num_rows, in_size, generator=generator, device=device)
    weight = torch.randn(out_size, in_size, generator=generator, device=device) / in_size**0.5
    return {"x": x.to(dtype), "weight": weight.to(dtype)}
