"""Which implementation of an op runs: native (C++/CUDA), triton or reference, chosen once per call site's device.

An `Op` lists its implementations in order of preference. `op.choose(device, impl)` returns one:
an explicit `impl` works or raises; only "auto" may fall through the list, and `python -m kernels` prints what it picks
and why.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

REGISTRY: dict[str, Op] = {}


@dataclass(frozen=True)
class Implementation:
    name: str
    """native | triton | reference"""
    run: Callable[..., Any]
    why_not: Callable[[torch.device], str] = lambda device: ""
    """Empty when it can run on the device, else the reason in a few words."""


@dataclass(frozen=True)
class Op:
    name: str
    implementations: tuple[Implementation, ...]
    """In order of preference."""
    _chosen: dict[tuple[str, str], Implementation] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        REGISTRY[self.name] = self

    def choose(self, device: torch.device, impl: str = "auto") -> Implementation:
        key = (device.type, impl)
        if key not in self._chosen:
            self._chosen[key] = self._resolve(device, impl)
        return self._chosen[key]

    def _resolve(self, device: torch.device, impl: str) -> Implementation:
        if impl == "auto":
            for implementation in self.implementations:
                if not implementation.why_not(device):
                    return implementation
            reasons = "; ".join(f"{i.name}: {i.why_not(device)}" for i in self.implementations)
            raise ValueError(f"{self.name}: nothing runs on {device} ({reasons})")
        named = {i.name: i for i in self.implementations}
        if impl not in named:
            raise ValueError(f"{self.name}: impl must be one of {['auto', *named]}, got {impl!r}")
        reason = named[impl].why_not(device)
        if reason:
            raise ValueError(f"{self.name}: impl={impl!r} cannot run on {device}: {reason}")
        return named[impl]


def table(device: torch.device) -> list[tuple[str, str, str, str]]:
    """Rows (op, implementations that can run on `device`, the one "auto" picks, why the ones before it do not run)."""
    rows = []
    for name, op in sorted(REGISTRY.items()):
        able = [i.name for i in op.implementations if not i.why_not(device)]
        reasons = [f"{i.name}: {i.why_not(device)}" for i in op.implementations if i.why_not(device)]
        picked = op.choose(device).name if able else "none"
        unforced = f"{picked} is the only one" if len(able) == 1 else f"{picked} comes first"
        why = "; ".join(reasons) or unforced
        rows.append((name, ", ".join(able), picked, why))
    return rows
