"""Loads the compiled kernels of csrc/, or records why it cannot.

`make` builds one library per instruction set (kernels/_native_<isa>.so, see CMakeLists.txt). The best one
that is built and that this CPU runs is loaded, once. REASON_RL_ISA names another, for tests and comparisons:
a value has the same bits in any batch, but not on every instruction set. REASON_RL_NATIVE_DIR names another
folder to search (`make sanitize`). In a checkout, a library is loaded only if it was built from the current
csrc/: ops of other sources may differ.
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
"""Instruction sets, best first, and the flags of /proc/cpuinfo that each needs."""
FOLDER = Path(os.environ.get("REASON_RL_NATIVE_DIR") or Path(__file__).parent).resolve()
SOURCES = Path(__file__).resolve().parent.parent / "csrc"
"""A checkout has this folder next to kernels/; an installed package has none."""
HASH_MARK = b"reason_rl_source_hash="
"""Precedes the hash in each library (CMakeLists.txt)."""
STALE = "built from other sources (run `make native`)"


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """The CPU flags that Linux lists; empty without /proc/cpuinfo (then only the portable library is
    loaded)."""
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "flags":
                return frozenset(value.split())
    return frozenset()


def library(isa: str) -> Path:
    return FOLDER / f"_native_{isa}.so"


@functools.cache
def source_hash(sources: Path) -> str:
    """sha256 over the lines "<sha256 of a file> <its path>" of all compiled files, as CMakeLists.txt computes
    it."""
    paths = {path.relative_to(sources).as_posix(): path for end in ("cpp", "cu", "h") for path in sources.rglob(f"[!.]*.{end}")}
    lines = (f"{hashlib.sha256(paths[name].read_bytes()).hexdigest()} {name}\n" for name in sorted(paths))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def is_stale(path: Path) -> bool:
    """True if the library was built from other sources than this checkout's. Reads the file, since a loaded
    library stays loaded."""
    if not (SOURCES / "bindings.cpp").is_file():
        return False
    if not path.stat().st_size:
        return True
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(HASH_MARK + source_hash(SOURCES).encode()) < 0


def pick_isa(requested: str, flags: frozenset[str]) -> tuple[str, str]:
    """-> (the instruction set to load, "") or ("", the reason for none). A requested one that cannot be
    loaded raises."""
    able = [isa for isa, needed in FLAGS.items() if flags.issuperset(needed)]
    built = [isa for isa in FLAGS if library(isa).is_file()]
    # REASON_RL_ISA: that library or an error.
    if requested:
        if requested not in FLAGS:
            raise ValueError(f"REASON_RL_ISA must be one of {list(FLAGS)}, got {requested!r}")
        if requested not in built:
            raise ValueError(f"REASON_RL_ISA={requested}, but {library(requested)} was not built")
        if requested not in able:
            raise ValueError(f"REASON_RL_ISA={requested}, but this CPU runs only {able}")
        if is_stale(library(requested)):
            raise ValueError(f"REASON_RL_ISA={requested}, but {library(requested)} was {STALE}")
        return requested, ""
    # Otherwise the best library that is up to date.
    usable = [isa for isa in able if isa in built]
    for isa in usable:
        if not is_stale(library(isa)):
            return isa, ""
    return "", STALE if usable else "not built here (`make native` builds it, or names what is missing)"


def load(requested: str) -> tuple[str, str]:
    """Loads the library that `pick_isa` picks; returns the same pair."""
    isa, missing = pick_isa(requested, cpu_flags())
    try:
        if isa:
            torch.ops.load_library(str(library(isa)))
    except OSError as error:
        problem = f"{library(isa).name} does not load: {str(error).splitlines()[0]}"
        if requested:
            raise ValueError(f"REASON_RL_ISA={requested}, but {problem}") from error
        # For example a build for another version of torch. The reference ops still work, and `python -m
        # kernels` gives the reason.
        return "", problem
    return isa, missing


ISA, _MISSING = load(os.environ.get("REASON_RL_ISA", ""))

OPS: Any = torch.ops.reason_rl
DTYPES = (torch.float32, torch.bfloat16)
"""The dtypes of the native ops."""


def cpu_unsupported_reason(device: torch.device) -> str:
    """`Implementation.unsupported_reason` of the C++ ops for the CPU."""
    return "CPU only" if device.type != "cpu" else _MISSING


@functools.cache
def _load_cuda() -> str:
    """Loads the library of the CUDA kernels at its first use -> "", or the reason why it cannot."""
    path = FOLDER / "_native_cuda.so"
    if not torch.cuda.is_available():
        return "no CUDA device"
    if not path.is_file():
        return "not built here (`make native` builds it if nvcc is found)"
    if is_stale(path):
        return STALE
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} does not load: {str(error).splitlines()[0]}"
    return ""


def cuda_unsupported_reason(device: torch.device) -> str:
    """`Implementation.unsupported_reason` of the CUDA C++ ops."""
    return "CUDA only" if device.type != "cuda" else _load_cuda()


def has_fast_bf16() -> bool:
    """True if this CPU multiplies bf16 at twice the rate of f32: only then is bf16 faster on the CPU."""
    return ISA == "avx512_bf16"


def _register_fakes() -> None:
    """torch.compile traces an op through its fake kernel. Ours return nothing: the ops write into their
    arguments."""
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("reason_rl::"):
            torch.library.register_fake(name, lambda *args: None)


if ISA:
    _register_fakes()
