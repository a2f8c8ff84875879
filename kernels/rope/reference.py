"""The specification of `rope`: each pair (x[c], x[c + C/2]) is rotated by its angle, in f32."""

from __future__ import annotations

import torch


def rope_reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [T, H, C], cos and sin [T, C/2] -> [T, H, C]."""
    wide = x.float() if x.dtype != torch.float64 else x
    first, second = wide.chunk(2, dim=-1)  # [T, H, C/2] each
    cos, sin = cos[:, None], sin[:, None]  # [T, 1, C/2]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def make_inputs(
    num_tokens: int, num_heads: int, head_dim: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0
) -> dict[str, torch.Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(num_tokens, num_heads, head_dim, generator=generator, device=device)
    angle = torch.arange(num_tokens, device=device)[:, None] * 10000.0 ** -torch.linspace(0, 1, head_dim // 2, device=device)
    if dtype == torch.float64:
        angle = angle.double()
    return {"x": x.to(dtype), "cos": angle.cos(), "sin": angle.sin()}
