"""The specification of `swiglu`, with exp and exactly rounded operations only.

torch's silu on the CPU rounds differently in a loop's tail than in its vectorised body, so a value's bits
would depend on its position in the batch. exp does not, and division and multiplication are rounded exactly
everywhere.
"""

from __future__ import annotations

import torch


def swiglu_reference(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up [T, 2I] -> [T, I]."""
    wide = gate_up.float() if gate_up.dtype != torch.float64 else gate_up
    gate, up = wide.chunk(2, dim=-1)
    # exp(-gate) overflows to inf below -88, where silu is 0 in f32 anyway. The clamp keeps inf out of the
    # gradient.
    return (gate / (1 + torch.exp(-gate.clamp(min=-80.0))) * up).to(gate_up.dtype)


def make_inputs(
    num_tokens: int, inner_size: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0
) -> dict[str, torch.Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    return {"gate_up": torch.randn(num_tokens, 2 * inner_size, generator=generator, device=device).to(dtype)}
