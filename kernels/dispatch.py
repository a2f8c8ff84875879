"""Which implementation of an op runs: native (C++), cuda (CUDA C++), triton or reference, chosen once per device and dtype.

An `Op` lists its implementations in order of preference. `op.choose(tensor, impl)` returns one: an explicit `impl` works or raises;
only "auto" may fall through the list, and `python -m kernels` prints what it picks and why.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from kernels.checks import SHORT

REGISTRY: dict[str, Op] = {}
FLOAT32_OPS = ("group_advantage", "grpo_loss", "moe_route")
"""They are given f32 whatever the model computes in."""


@dataclass(frozen=True)
class Implementation:
    name: str
    """native | cuda | triton | reference | torch"""
    run: Callable[..., Any]
    why_not: Callable[[torch.device], str] = lambda device: ""
    """Empty when it can run on the device, else the reason in a few words."""
    dtypes: tuple[torch.dtype, ...] = ()
    """What it computes in; empty: anything."""
    is_automatic: bool = True
    """False: only where it is asked for by name."""

    def refuses(self, device: torch.device, dtype: torch.dtype) -> str:
        if self.dtypes and dtype not in self.dtypes:
            return f"not for {SHORT.get(dtype, str(dtype))}"
        return self.why_not(device)


@dataclass(frozen=True)
class Op:
    name: str
    implementations: tuple[Implementation, ...]
    """In order of preference."""
    _chosen: dict[tuple[str, torch.dtype, str], Implementation] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        REGISTRY[self.name] = self

    def choose(self, like: torch.Tensor, impl: str = "auto") -> Implementation:
        """The implementation for `like`'s device and dtype."""
        key = (like.device.type, like.dtype, impl)
        if key not in self._chosen:
            self._chosen[key] = self.resolve(like.device, like.dtype, impl)
        return self._chosen[key]

    def resolve(self, device: torch.device, dtype: torch.dtype, impl: str = "auto") -> Implementation:
        if impl == "auto":
            candidates = [i for i in self.implementations if i.is_automatic]
            for implementation in candidates:
                if not implementation.refuses(device, dtype):
                    return implementation
            reasons = "; ".join(f"{i.name}: {i.refuses(device, dtype)}" for i in candidates)
            raise ValueError(f"{self.name}: nothing runs on {device} ({reasons})")
        named = {i.name: i for i in self.implementations}
        if impl not in named:
            raise ValueError(f"{self.name}: impl must be one of {['auto', *named]}, got {impl!r}")
        reason = named[impl].refuses(device, dtype)
        if reason:
            raise ValueError(f"{self.name}: impl={impl!r} cannot run on {device}: {reason}")
        return named[impl]


def table(device: torch.device, dtype: torch.dtype = torch.float32) -> list[tuple[str, str, str, str]]:
    """Rows (op, implementations that can run on `device`, the one "auto" picks, why the ones before it are not picked)."""
    rows = []
    for name, op in sorted(REGISTRY.items()):
        given = torch.float32 if name in FLOAT32_OPS else dtype
        refusals = {i.name: i.refuses(device, given) for i in op.implementations}
        able = [i for i in op.implementations if not refusals[i.name]]
        picked = next((i.name for i in able if i.is_automatic), "none")
        before = [*refusals][:[*refusals, "none"].index(picked)]
        reasons = [f"{earlier}: {refusals[earlier] or 'by name only'}" for earlier in before]
        unforced = f"{picked} is the only one" if len(able) == 1 else f"{picked} comes first"
        rows.append((name, ", ".join(i.name for i in able), picked, "; ".join(reasons) or unforced))
    return rows
