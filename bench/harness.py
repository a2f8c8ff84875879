"""Shared by all benchmarks: a description of the machine, the `--json` option, memory, rates, medians.

Needs only torch. Left out: workloads and peers, which are in each `bench/<name>.py`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

CHECKOUT = Path(__file__).resolve().parent.parent


def describe_setting(device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Device, versions and commit, recorded with every result."""
    # The machine and the versions; then the GPU's and the dtype.
    device = torch.device(device)
    setting: dict[str, Any] = {
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
    }
    if device.type == "cuda":
        setting["cuda"] = torch.version.cuda
        setting["triton"] = version("triton") if importlib.util.find_spec("triton") else "not installed"
    if dtype is not None:
        setting["dtype"] = str(dtype).removeprefix("torch.")
    return setting


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The model name in /proc/cpuinfo, else platform.processor()."""
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def commit(checkout: Path = CHECKOUT) -> str:
    """The checkout's commit, with "-dirty" if tracked files differ from it. Without git: REASON_RL_COMMIT,
    for a copy of the checkout on another machine, or "unknown"."""
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("REASON_RL_COMMIT", "unknown")


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """`--json FILE` writes the record to FILE; `--json` prints it as the last line of stdout."""
    parser.add_argument("--json", nargs="?", const="-", default=None, metavar="FILE",
                        help="write the results to FILE, or as the last line of stdout")


def write_json(record: Mapping[str, Any], target: str | None) -> None:
    """`target` is args.json; None writes nothing. Raises for NaN and infinity, which are not JSON."""
    if target is None:
        return
    if target == "-":
        sys.stderr.flush()
        print(json.dumps(record, allow_nan=False), flush=True)
        return
    path = Path(target)
    text = json.dumps(record, indent=2, allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")


def peak_rss_bytes(process: int | str = "self") -> int:
    """Peak resident memory of this process, or of another by its id, since it started. A benchmark reports
    the difference between the values at the end and after start-up.

    Read from /proc if it exists: getrusage's ru_maxrss starts a child at its parent's peak, even across exec.
    """
    status = Path(f"/proc/{process}/status")
    if status.is_file():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def spread(values: Sequence[float]) -> dict[str, float]:
    """{"median", "p20", "p80"}; quantiles are interpolated linearly."""
    if not values:
        raise ValueError("spread needs at least one value, got none")
    ordered = sorted(values)

    def quantile(share: float) -> float:
        position = share * (len(ordered) - 1)
        below = int(position)
        above = min(below + 1, len(ordered) - 1)
        return ordered[below] + (ordered[above] - ordered[below]) * (position - below)

    return {"median": statistics.median(ordered), "p20": quantile(0.2), "p80": quantile(0.8)}


def time_calls(call: Callable[[], object], repeats: int, warmup: int = 1) -> list[float]:
    """Seconds of each of `repeats` calls, after `warmup` untimed ones; synchronized with a GPU."""
    for _ in range(warmup):
        call()
    seconds = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds


def synchronize() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


GEMM_SIZE = {"cuda": 8192, "cpu": 2048}
COPY_BYTES = {"cuda": 1 << 32, "cpu": 1 << 27}
BURST = {"cuda": 4, "cpu": 1}
"""Calls per timing: synchronizing with a GPU costs about 20 us."""


def gemm_gflops(dtype: torch.dtype, device: torch.device | str = "cpu", size: int | None = None, repeats: int = 5) -> float:
    """GFLOP/s of the fastest of several size^3 matrix products on random data: the compute ceiling."""
    device = torch.device(device)
    size, burst = size or GEMM_SIZE[device.type], BURST[device.type]
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator, device=device).to(dtype) for _ in range(2))
    out = torch.zeros(size, size, device=device, dtype=dtype)
    best_s = min(time_calls(lambda: [torch.mm(a, b, out=out) for _ in range(burst)], repeats)) / burst
    return 2 * size**3 / best_s / 1e9


def copy_gbytes(device: torch.device | str = "cpu", repeats: int = 5) -> float:
    """GB/s of the fastest of several large copies in device memory; counts bytes read and bytes written."""
    device = torch.device(device)
    num_bytes, burst = COPY_BYTES[device.type], BURST[device.type]
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    best_s = min(time_calls(lambda: [target.copy_(source) for _ in range(burst)], repeats)) / burst
    return 2 * num_bytes / best_s / 1e9


def gemm_rates(device: torch.device | str = "cpu", size: int | None = None) -> dict[str, float]:
    """{"float32": GFLOP/s, "bfloat16": GFLOP/s} of size^3 products; default: 2048 on a CPU, 8192 on a GPU."""
    return {str(dtype).removeprefix("torch."): gemm_gflops(dtype, device, size) for dtype in (torch.float32, torch.bfloat16)}
