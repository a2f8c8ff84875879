"""The specification of `linear`: torch's own GEMM, with few rows padded so that a row's bits do not depend on its company."""

from __future__ import annotations

import torch
import torch.nn.functional as F

MIN_ROWS = 16
"""torch's float32 GEMM on the CPU takes other code paths (another order of the sum over K) for fewer than 12 rows.
Seen with torch 2.13 on AVX-512; tests/kernels/test_linear.py watches it."""


def linear_reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [M, K] @ weight [N, K]^T -> [M, N] in x's dtype."""
    weight = weight.to(x.dtype)
    num_rows = x.shape[0]
    if num_rows >= MIN_ROWS:
        return F.linear(x, weight)
    return F.linear(F.pad(x, (0, 0, 0, MIN_ROWS - num_rows)), weight)[:num_rows]


def linear_torch(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """torch's own GEMM as it is: a row's bits may depend on the rows beside it."""
    return F.linear(x, weight.to(x.dtype))


def make_inputs(
    num_rows: int, out_size: int, in_size: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0
) -> dict[str, torch.Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(num_rows, in_size, generator=generator, device=device)
    weight = torch.randn(out_size, in_size, generator=generator, device=device) / in_size**0.5
    return {"x": x.to(dtype), "weight": weight.to(dtype)}
