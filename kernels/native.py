"""Loads the compiled kernels of csrc/: the best library that this CPU runs, or a reason why none is loaded.

`make` builds one CPU library per instruction set (kernels/_native_<isa>.so, see CMakeLists.txt). The best one
is loaded once, at import. REASON_RL_ISA requests another one, for tests and comparisons: the bits of a value
depend on the instruction set, though not on the batch. REASON_RL_NATIVE_DIR looks for libraries in another
folder (`make sanitize`). In a checkout, a library is loaded only if it was built from the present contents of
csrc/, because its ops may differ otherwise.
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
"""Instruction sets, best first, with the flags of /proc/cpuinfo that each needs."""
FOLDER = Path(os.environ.get("REASON_RL_NATIVE_DIR") or Path(__file__).parent).resolve()
SOURCES = Path(__file__).resolve().parent.parent / "csrc"
"""csrc/ of a checkout; an installed package does not have it."""
HASH_MARK = b"reason_rl_source_hash="
"""Precedes the hash of the sources in each library (CMakeLists.txt)."""
STALE = "built from other sources (run `make native`)"


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """The CPU's flags; none without /proc/cpuinfo, so that only the portable library is loaded."""
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
    """sha256 of the lines "<sha256> <path>" of all compiled files, as in CMakeLists.txt; takes 1 to 2 ms."""
    paths = {path.relative_to(sources).as_posix(): path for end in ("cpp", "cu", "h") for path in sources.rglob(f"[!.]*.{end}")}
    lines = (f"{hashlib.sha256(paths[name].read_bytes()).hexdigest()} {name}\n" for name in sorted(paths))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def is_stale(path: Path) -> bool:
    """Was the library built from other sources than the present csrc/? Reads the file without loading it."""
    if not (SOURCES / "bindings.cpp").is_file():
        return False
    if not path.stat().st_size:
        return True
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(HASH_MARK + source_hash(SOURCES).encode()) < 0


def pick_isa(requested: str, flags: frozenset[str]) -> tuple[str, str]:
    """-> (the instruction set to load, "") or ("", the reason for none). A request that cannot be fulfilled raises."""
    runnable = [isa for isa, needed in FLAGS.items() if flags.issuperset(needed)]
    built = [isa for isa in FLAGS if library(isa).is_file()]
    if requested:
        if requested not in FLAGS:
            raise ValueError(f"REASON_RL_ISA must be one of {list(FLAGS)}, got {requested!r}")
        if requested not in built:
            raise ValueError(f"REASON_RL_ISA={requested}, but {library(requested)} was not built")
        if requested not in runnable:
            raise ValueError(f"REASON_RL_ISA={requested}, but this CPU runs only {runnable}")
        if is_stale(library(requested)):
            raise ValueError(f"REASON_RL_ISA={requested}, but {library(requested)} was {STALE}")
        return requested, ""
    usable = [isa for isa in runnable if isa in built]
    for isa in usable:
        if not is_stale(library(isa)):
            return isa, ""
    return "", STALE if usable else "not built here (`make native` builds it, or names what is missing)"


def load(requested: str) -> tuple[str, str]:
    """Loads the library that `pick_isa` picks, and returns the same pair."""
    isa, missing = pick_isa(requested, cpu_flags())
    try:
        if isa:
            torch.ops.load_library(str(library(isa)))
    except OSError as error:
        reason = f"{library(isa).name} does not load: {str(error).splitlines()[0]}"
        if requested:
            raise ValueError(f"REASON_RL_ISA={requested}, but {reason}") from error
        # For example, an old build with a new torch: the reference ops still work.
        return "", reason
    return isa, missing


ISA, _MISSING = load(os.environ.get("REASON_RL_ISA", ""))

OPS: Any = torch.ops.reason_rl
DTYPES = (torch.float32, torch.bfloat16)
"""The compute dtypes of the native ops."""


def cpu_why_not(device: torch.device) -> str:
    """Why csrc/'s CPU ops cannot run on the device, or ""; for `Implementation.why_not`."""
    return "CPU only" if device.type != "cpu" else _MISSING


@functools.cache
def _load_cuda() -> str:
    """Loads the library of the CUDA kernels on first use; returns "" or the reason why it is not loaded."""
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


def cuda_why_not(device: torch.device) -> str:
    """Why csrc/'s CUDA ops cannot run on the device, or ""; for `Implementation.why_not`."""
    return "CUDA only" if device.type != "cuda" else _load_cuda()


def has_fast_bf16() -> bool:
    """Does the library multiply bf16 at twice the rate of f32? Only then is bf16 faster on a CPU."""
    return ISA == "avx512_bf16"


def _register_fakes() -> None:
    """Fake kernels for torch.compile. They do nothing, because the ops only write into existing tensors."""
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("reason_rl::"):
            torch.library.register_fake(name, lambda *args: None)


if ISA:
    _register_fakes()
