"""Compiles Triton kernels for GPUs that this machine lacks, and reads their registers, spills, shared memory
and instructions.

Each kernels/<op>/triton_kernel.py lists in `compiles()` the kernels that its launchers launch. `python -m
bench.resources` writes the table, tests/kernels/test_ahead_of_time.py checks it. Needs triton with its
bundled ptxas, and no GPU.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kernels.checks import SHORT

SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}
"""Bytes of shared memory that one program may use, by compute capability."""
MATRIX_INSTRUCTION = {80: r"mma\.sync", 90: r"wgmma\.mma_async", 100: r"tcgen05\.mma"}
"""The matrix instruction of each architecture, for 16-bit operands."""
ASYNC_COPY = r"cp\.async"
"""Matches TMA copies too (cp.async.bulk)."""


def pointer(dtype: torch.dtype) -> str:
    """The Triton type of a tensor argument."""
    return "*" + {"f32": "fp32", "f16": "fp16", "f64": "fp64"}.get(SHORT[dtype], SHORT[dtype])


@dataclass(frozen=True)
class Compile:
    """One specialisation of a kernel."""

    name: str
    """The launcher's name, and the words that distinguish this specialisation."""
    dtype: torch.dtype
    kernel: Any
    """The function that @triton.jit returned."""
    arguments: Mapping[str, Any]
    """In the kernel's order: a type ("*bf16", "i32", "fp32") or, for an integer that Triton would specialise
    on, 1. Pointers and integers of type "i32" are taken as divisible by 16."""
    options: Mapping[str, Any]
    """The constexprs, and num_warps, num_stages."""
    is_matrix_product: bool = False
    """True: 16-bit operands must be multiplied by the architecture's matrix instruction and loaded by
    asynchronous copies."""
    may_spill: bool = False


@dataclass(frozen=True)
class Resources:
    registers: int
    """Per thread."""
    spill_bytes: int
    shared_bytes: int
    matrix_instructions: int
    async_copies: int


def ops_with_triton() -> list[str]:
    """The ops that have a kernels/<op>/triton_kernel.py."""
    return sorted(path.parent.name for path in Path(__file__).parent.glob("*/triton_kernel.py"))


def compiles_of(op: str) -> list[Compile]:
    found: list[Compile] = importlib.import_module(f"kernels.{op}.triton_kernel").compiles()
    return found


def build_for(what: Compile, capability: int) -> tuple[Any, str]:
    """Compiles `what` for compute capability 80, 90 or 100 with its launcher's options -> (the compiled
    kernel, ptxas's log)."""
    os.environ |= {"TRITON_ALWAYS_COMPILE": "1", "TRITON_DUMP_PTXAS_LOG": "1"}
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    # Split the options into launch options and constexprs.
    launch = {key: what.options[key] for key in ("num_warps", "num_stages", "num_ctas") if key in what.options}
    constants = {key: value for key, value in what.options.items() if key not in launch}
    constants |= {key: value for key, value in what.arguments.items() if not isinstance(value, str)}
    # The type and alignment of each argument, as a launch would find them.
    signature = {name: "constexpr" if name in constants else what.arguments[name] for name in what.kernel.arg_names}
    attributes = {(index,): [["tt.divisibility", 16]] for index, name in enumerate(what.kernel.arg_names)
                  if signature[name].startswith("*") or signature[name] in ("i32", "i64")}
    source = ASTSource(what.kernel, signature, constexprs=constants, attrs=attributes)
    with contextlib.redirect_stdout(io.StringIO()) as log:  # Triton prints the log of ptxas
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch)
    return compiled, log.getvalue()


def compile_for(what: Compile, capability: int) -> Resources:
    """The resources that `what` needs there."""
    compiled, ptxas_log = build_for(what, capability)
    ptx = compiled.asm["ptx"]
    registers, spills = re.search(r"Used (\d+) registers", ptxas_log), re.findall(r"(\d+) bytes spill", ptxas_log)
    if registers is None:
        raise RuntimeError(f"ptxas reported no registers for {what.name}: {ptxas_log[:400]!r}")
    return Resources(int(registers[1]), sum(map(int, spills)), compiled.metadata.shared,
                     len(re.findall(MATRIX_INSTRUCTION[capability], ptx)), len(re.findall(ASYNC_COPY, ptx)))
