"""The angles of rotary position embedding, as a table per position; `kernels.rope` turns the heads by them."""

from __future__ import annotations

import torch


def rope_table(max_positions: int, head_dim: int, theta: float) -> torch.Tensor:
    """-> f32[2, max_positions, head_dim / 2]: cos and sin of position * theta^(-2c / head_dim). Worked out in f64."""
    frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.arange(max_positions, dtype=torch.float64)[:, None] * frequency
    return torch.stack((angle.cos(), angle.sin())).float()
