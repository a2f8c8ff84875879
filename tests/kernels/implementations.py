"""A test file over every implementation of its op that can run: `implementation = each_implementation(OP)` at the top of it.
Of several ops, the first's implementations, and the others by the same names.

"auto" then means the one in turn, in the dtypes it is for. impl="torch" is left out: it promises no bits. What runs on a GPU alone
gets the same tests, marked `gpu`: the op's tensors go there and its results come back, the tests stay on the CPU.
With TRITON_INTERPRET=1 there is one in turn, Triton's interpreter (test_interpreted.py), at half a millisecond a program.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from kernels.dispatch import Implementation, Op
from kernels.triton_ops import IS_INTERPRETED

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CUDA_ONLY = ("triton", "cuda")


def each_implementation(*ops: Op) -> Any:
    all_named = [{i.name: i for i in op.implementations if i.is_automatic or i.name in CUDA_ONLY} for op in ops]
    named = all_named[0]
    able = {} if IS_INTERPRETED else {
        name: i for name, i in named.items() if name not in CUDA_ONLY and not i.refuses(CPU, torch.float32)}
    if IS_INTERPRETED and "triton" in named:
        able["triton"] = named["triton"]
    params = [pytest.param(name) for name in able]
    params += [pytest.param(f"{name} on cuda", marks=pytest.mark.gpu) for name in CUDA_ONLY if name in named and not IS_INTERPRETED]

    @pytest.fixture(params=params, autouse=True)
    def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
        choose, (name, *on_cuda) = Op.choose, request.param.split(maxsplit=1)
        meant = {op.name: replace(these[name], run=there_and_back(these[name].run)) if on_cuda else these[name]
                 for op, these in zip(ops, all_named, strict=True)}

        def choose_this(self: Op, like: torch.Tensor, impl: str = "auto") -> Implementation:
            chosen = meant.get(self.name)
            if chosen and impl == "auto" and not chosen.refuses(CUDA if on_cuda else like.device, like.dtype):
                return chosen
            return choose(self, like, impl)

        monkeypatch.setattr(Op, "choose", choose_this)
        return str(name)

    return implementation


def there_and_back(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run` on the GPU, for tensors on the CPU: autograd follows both ways."""

    def move(value: Any, device: torch.device) -> Any:
        if isinstance(value, torch.Tensor) or hasattr(value, "to"):
            return value.to(device)
        if isinstance(value, dict):
            return {key: move(item, device) for key, item in value.items()}
        if isinstance(value, tuple) and hasattr(value, "_fields"):  # a named one
            return type(value)(*(move(item, device) for item in value))
        return type(value)(move(item, device) for item in value) if isinstance(value, (tuple, list)) else value

    return lambda *args, **kwargs: move(run(*move(args, CUDA), **move(kwargs, CUDA)), CPU)
