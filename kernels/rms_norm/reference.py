"""The specification of `rms_norm`: reduced in float32, rounded once to x's dtype at the end."""

from __future__ import annotations

import torch


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., D], weight [D] -> [..., D]."""
    wide = x.float() if x.dtype != torch.float64 else x
    scale = torch.rsqrt((wide * wide).mean(-1, keepdim=True) + eps)
    return (wide * scale * weight).to(x.dtype)


def make_inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(*shape, generator=generator, device=device)
    weight = 1 + 0.1 * torch.randn(shape[-1], generator=generator, device=device)
    return {"x": x.to(dtype), "weight": weight if dtype != torch.float64 else weight.double()}
