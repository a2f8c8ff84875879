"""Runs a test file once for every implementation of its op that can run.

A file opens with `implementation = each_implementation(OP)`; it may name several ops, which then all use the same
implementation. "auto" then picks that implementation, in the dtypes it supports. impl="torch" is left out: it
promises no bits. An implementation for GPUs gets the same tests, marked `gpu`: the op's tensors are copied to the GPU
and its results back, the tests stay on the CPU. With TRITON_INTERPRET=1 the only one is Triton's interpreter
(test_interpreted.py), at half a millisecond a program.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from kernels.dispatch import Implementation, Op
from kernels.grpo_loss import LossInputs
from kernels.triton_ops import IS_INTERPRETED

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CUDA_ONLY = ("triton", "cuda")


def each_implementation(op: Op, *others: Op) -> Any:
    by_op = [{i.name: i for i in o.implementations if i.is_automatic or i.name in CUDA_ONLY} for o in (op, *others)]
    named = by_op[0]
    able = {} if IS_INTERPRETED else {
        name: i for name, i in named.items() if name not in CUDA_ONLY and not i.refusal(CPU, torch.float32)}
    if IS_INTERPRETED and "triton" in named:
        able["triton"] = named["triton"]
    params = [pytest.param(name) for name in able]
    params += [pytest.param(f"{name} on cuda", marks=pytest.mark.gpu) for name in CUDA_ONLY if name in named and not IS_INTERPRETED]

    @pytest.fixture(params=params, autouse=True)
    def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
        choose, (name, *on_cuda) = Op.choose, request.param.split(maxsplit=1)
        meant = {o.name: found[name] for o, found in zip((op, *others), by_op, strict=True)}
        if on_cuda:
            meant = {key: replace(i, run=there_and_back(i.run)) for key, i in meant.items()}

        def choose_this(self: Op, like: torch.Tensor, impl: str = "auto", variant: str = "") -> Implementation:
            this = meant.get(self.name)
            if this and impl == "auto" and not this.refusal(CUDA if on_cuda else like.device, like.dtype, variant):
                return this
            return choose(self, like, impl, variant)

        monkeypatch.setattr(Op, "choose", choose_this)
        return str(name)

    return implementation


def there_and_back(run: Callable[..., Any]) -> Callable[..., Any]:
    """Calls `run` on the GPU for tensors on the CPU; autograd follows both copies."""

    def move(value: Any, device: torch.device) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(device)
        if isinstance(value, dict):
            return {key: move(item, device) for key, item in value.items()}
        if isinstance(value, LossInputs):
            return replace(value, **{f.name: move(getattr(value, f.name), device) for f in fields(value)})
        if isinstance(value, tuple) and hasattr(value, "_fields"):  # a named one
            return type(value)(*(move(item, device) for item in value))
        return type(value)(move(item, device) for item in value) if isinstance(value, (tuple, list)) else value

    return lambda *args, **kwargs: move(run(*move(args, CUDA), **move(kwargs, CUDA)), CPU)
