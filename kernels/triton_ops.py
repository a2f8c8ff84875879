"""The Triton kernels as torch ops: where they run, and how an op's launchers become
torch.ops.reason_rl_triton.*.

kernels/<op>/__init__.py declares an op's schemas. Most equal those of the native op (csrc/bindings.cpp), so
that one `autograd.Function` (kernels/<op>/function.py) serves both. kernels/<op>/triton_kernel.py defines the
launchers under the same names; it is imported at the first call, so that everything else works without
triton. With TRITON_INTERPRET=1 in the environment the kernels run on the CPU, slowly, for tests
(tests/kernels/test_interpreted.py).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton reads it when a kernel is decorated, so it applies to the whole process."""
DTYPES = (torch.float32, torch.bfloat16)
OPS: Any = torch.ops.reason_rl_triton

_LIBRARY = torch.library.Library("reason_rl_triton", "DEF")


@functools.cache
def _missing() -> str:
    return "" if importlib.util.find_spec("triton") else "triton is not installed"


def unsupported_reason(device: torch.device) -> str:
    """`Implementation.unsupported_reason` of the Triton ops."""
    if device.type == "cuda" or (IS_INTERPRETED and device.type == "cpu"):
        return _missing()
    return "CUDA only"


def register(op: str, schemas: Mapping[str, str]) -> None:
    """Defines ops by name and schema, e.g. {"linear_fwd": "(Tensor(a!) y, Tensor x, Tensor weight) -> ()"}.
    Each writes into its arguments and returns nothing."""
    for name, schema in schemas.items():
        _LIBRARY.define(name + schema)
        for device in ("CUDA", "CPU") if IS_INTERPRETED else ("CUDA",):
            _LIBRARY.impl(name, _launcher(op, name), device)
        torch.library.register_fake(f"reason_rl_triton::{name}", lambda *args: None, lib=_LIBRARY)


def _launcher(op: str, name: str) -> Callable[..., None]:
    @functools.cache
    def find() -> Callable[..., None]:
        launcher: Callable[..., None] = getattr(importlib.import_module(f"kernels.{op}.triton_kernel"), name)
        return launcher

    def launch(*args: Any) -> None:
        # Triton launches on the current device, which may differ from the tensors'.
        tensor = next(arg for arg in args if isinstance(arg, torch.Tensor))
        if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
            with torch.cuda.device(tensor.device):
                find()(*args)
        else:
            find()(*args)

    return launch
