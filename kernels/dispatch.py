"""Chooses the implementation of an op: native (C++), cuda (CUDA C++), triton or reference.

An `Op` lists its implementations in order of preference. `op.choose(tensor, impl)` returns one. An explicit
`impl` runs or raises; only "auto" falls through the list. `python -m kernels` prints each automatic choice
and its reason.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from kernels.checks import SHORT

REGISTRY: dict[str, Op] = {}
FLOAT32_OPS = ("group_advantage", "grpo_loss", "moe_route")
"""Ops that get f32 inputs for any dtype of the model."""


@dataclass(frozen=True)
class Implementation:
    name: str
    """native | cuda | triton | reference | torch"""
    run: Callable[..., Any]
    unsupported_reason: Callable[[torch.device], str] = lambda device: ""
    """Empty if it runs on the device, else the reason in a few words."""
    dtypes: tuple[torch.dtype, ...] = ()
    """Dtypes that it accepts; empty: any."""
    variants: tuple[str, ...] = ()
    """Variants of the op that it implements, e.g. the surrogates of grpo_loss; empty: any."""
    is_automatic: bool = True
    """False: runs only if `impl` names it."""

    def refusal(self, device: torch.device, dtype: torch.dtype, variant: str = "") -> str:
        """Empty if it runs with these, else the reason in a few words."""
        if self.dtypes and dtype not in self.dtypes:
            return f"not for {SHORT.get(dtype, str(dtype))}"
        if variant and self.variants and variant not in self.variants:
            return f"does not implement {variant!r}"
        return self.unsupported_reason(device)


@dataclass(frozen=True)
class Op:
    name: str
    implementations: tuple[Implementation, ...]
    """In order of preference."""
    _chosen: dict[tuple[str, torch.dtype, str, str], Implementation] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        REGISTRY[self.name] = self

    def choose(self, like: torch.Tensor, impl: str = "auto", variant: str = "") -> Implementation:
        """The implementation for the device and dtype of `like`, resolved once for each combination."""
        key = (like.device.type, like.dtype, impl, variant)
        if key not in self._chosen:
            self._chosen[key] = self.resolve(like.device, like.dtype, impl, variant)
        return self._chosen[key]

    def resolve(self, device: torch.device, dtype: torch.dtype, impl: str = "auto", variant: str = "") -> Implementation:
        if impl == "auto":
            return self._first_able(device, dtype, variant)
        named = {i.name: i for i in self.implementations}
        if impl not in named:
            raise ValueError(f"{self.name}: impl must be one of {['auto', *named]}, got {impl!r}")
        reason = named[impl].refusal(device, dtype, variant)
        if reason:
            raise ValueError(f"{self.name}: impl={impl!r} cannot run on {device}: {reason}")
        return named[impl]

    def _first_able(self, device: torch.device, dtype: torch.dtype, variant: str) -> Implementation:
        candidates = [i for i in self.implementations if i.is_automatic]
        for implementation in candidates:
            if not implementation.refusal(device, dtype, variant):
                break
        else:
            reasons = "; ".join(f"{i.name}: {i.refusal(device, dtype, variant)}" for i in candidates)
            raise ValueError(f"{self.name}: nothing runs on {device} ({reasons})")
        # A variant may cost the user a kernel that would otherwise run here.
        if variant and implementation.name == "reference":
            usual = next(i for i in candidates if not i.refusal(device, dtype))
            if usual is not implementation:
                warn_once(f"{self.name}: no kernel implements {variant!r}; the reference runs instead")
        return implementation


@functools.cache
def warn_once(message: str) -> None:
    """Prints the line once per process."""
    logging.getLogger(__name__).warning(message)


def table(device: torch.device, dtype: torch.dtype = torch.float32) -> list[tuple[str, str, str, str]]:
    """One tuple per op: its name, the implementations that run on `device`, the automatic choice, and the
    reason for it."""
    rows = []
    for name, op in sorted(REGISTRY.items()):
        # Which implementations run here, and which of them "auto" picks.
        given = torch.float32 if name in FLOAT32_OPS else dtype
        refusals = {i.name: i.refusal(device, given) for i in op.implementations}
        able = [i for i in op.implementations if not refusals[i.name]]
        picked = next((i.name for i in able if i.is_automatic), "none")
        # The reasons against the implementations that are listed before the picked one.
        before = [*refusals][:[*refusals, "none"].index(picked)]
        reasons = [f"{earlier}: {refusals[earlier] or 'by name only'}" for earlier in before]
        unforced = f"{picked} is the only one" if len(able) == 1 else f"{picked} comes first"
        rows.append((name, ", ".join(i.name for i in able), picked, "; ".join(reasons) or unforced))
    return rows
