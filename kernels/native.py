"""The compiled kernels of csrc/: which library is loaded here, and why none is where none is.

`make` builds one library per instruction set (kernels/_native_<isa>.so, see CMakeLists.txt); the best one
that was built and that this CPU can run is loaded, once. REASON_RL_ISA names another, for tests and for
comparisons: a value's bits are the same in any batch, but not on any instruction set. REASON_RL_NATIVE_DIR
names another folder to look in (`make sanitize`). Beside csrc/, a library that was built from anything but
what stands there now is not loaded: its ops may mean something else.
"""

from __future__ import annotations

import functools
import hashlib
import mmap
import os
from pathlib import Path
from typing import Any

import torch

FLAGS = {
    "avx512_bf16": ("avx512f", "avx512bw", "avx512dq", "avx512vl", "fma", "avx512_bf16"),
    "avx512": ("avx512f", "avx512bw", "avx512dq", "avx512vl", "fma"),
    "avx2": ("avx2", "fma"),
    "portable": (),
}
"""Instruction sets, the best first, and the flags of /proc/cpuinfo that each needs."""
FOLDER = Path(os.environ.get("REASON_RL_NATIVE_DIR") or Path(__file__).parent).resolve()
SOURCES = Path(__file__).resolve().parent.parent / "csrc"
"""Beside a checkout's kernels/; an installed package has none."""
HASH_MARK = b"reason_rl_source_hash="
"""What stands before the hash in each library (CMakeLists.txt)."""
STALE = "built from other sources (run `make native`)"


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """What the CPU says it can do; nothing where Linux does not tell (then only the portable library is
    loaded)."""
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "flags":
                return frozenset(value.split())
    return frozenset()


def library(isa: str) -> Path:
    return FOLDER / f"_native_{isa}.so"


@functools.cache
def source_hash(sources: Path) -> str:
    """sha256 over the lines "<sha256 of a file> <its path>" of what is compiled, as CMakeLists.txt has it; a
    millisecond or two."""
    paths = {path.relative_to(sources).as_posix(): path for end in ("cpp", "cu", "h") for path in sources.rglob(f"[!.]*.{end}")}
    lines = (f"{hashlib.sha256(paths[name].read_bytes()).hexdigest()} {name}\n" for name in sorted(paths))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def is_stale(path: Path) -> bool:
    """Was the library built from other sources than those beside this file? Read from the file: what is
    loaded stays loaded."""
    if not (SOURCES / "bindings.cpp").is_file():
        return False
    if not path.stat().st_size:
        return True
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(HASH_MARK + source_hash(SOURCES).encode()) < 0


def pick_isa(wished: str, flags: frozenset[str]) -> tuple[str, str]:
    """-> (the instruction set to load, "") or ("", why none). A wish that cannot be met raises."""
    able = [isa for isa, needed in FLAGS.items() if flags.issuperset(needed)]
    built = [isa for isa in FLAGS if library(isa).is_file()]
    if wished:
        if wished not in FLAGS:
            raise ValueError(f"REASON_RL_ISA must be one of {list(FLAGS)}, got {wished!r}")
        if wished not in built:
            raise ValueError(f"REASON_RL_ISA={wished}, but {library(wished)} was not built")
        if wished not in able:
            raise ValueError(f"REASON_RL_ISA={wished}, but this CPU runs only {able}")
        if is_stale(library(wished)):
            raise ValueError(f"REASON_RL_ISA={wished}, but {library(wished)} was {STALE}")
        return wished, ""
    usable = [isa for isa in able if isa in built]
    for isa in usable:
        if not is_stale(library(isa)):
            return isa, ""
    return "", STALE if usable else "not built here (`make native` builds it and says what is missing)"


def load(wished: str) -> tuple[str, str]:
    """Loads what `pick_isa` picks -> the same."""
    isa, missing = pick_isa(wished, cpu_flags())
    try:
        if isa:
            torch.ops.load_library(str(library(isa)))
    except OSError as error:
        says = f"{library(isa).name} does not load: {str(error).splitlines()[0]}"
        if wished:
            raise ValueError(f"REASON_RL_ISA={wished}, but {says}") from error
        # An old build beside a new torch, say: the reference ops still work, and the table says why they are
        # used.
        return "", says
    return isa, missing


ISA, _MISSING = load(os.environ.get("REASON_RL_ISA", ""))

OPS: Any = torch.ops.reason_rl
DTYPES = (torch.float32, torch.bfloat16)
"""What the native ops compute in."""


def cpu_unsupported_reason(device: torch.device) -> str:
    """For `Implementation.unsupported_reason` of an op that csrc/ has for the CPU."""
    return "CPU only" if device.type != "cpu" else _MISSING


@functools.cache
def _load_cuda() -> str:
    """Loads the library of the CUDA kernels, at the first question that could use it; -> "" or why not."""
    path = FOLDER / "_native_cuda.so"
    if not torch.cuda.is_available():
        return "no CUDA device"
    if not path.is_file():
        return "not built here (`make native` builds it where nvcc is found)"
    if is_stale(path):
        return STALE
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} does not load: {str(error).splitlines()[0]}"
    return ""


def cuda_unsupported_reason(device: torch.device) -> str:
    """For `Implementation.unsupported_reason` of an op that csrc/ has in CUDA C++."""
    return "CUDA only" if device.type != "cuda" else _load_cuda()


def has_fast_bf16() -> bool:
    """bf16 products at twice the rate of float32: then bf16 is worth computing in, on the CPU."""
    return ISA == "avx512_bf16"


def _register_fakes() -> None:
    """torch.compile traces an op through its fake kernel; ours only write into tensors that exist."""
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("reason_rl::"):
            torch.library.register_fake(name, lambda *args: None)


if ISA:
    _register_fakes()
