"""A run's processes and device, and the exchange of small Python objects (graded groups, metrics).

One process, or several under torchrun: gloo on the CPU, nccl on GPUs. All ranks make the same decisions
because they decide from gathered values. Only rank 0 looks for checkpoints, takes locks and writes files; the
others get its result (`from_main`, `gather`).

Left out: sharding (fsdp.py).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from kernels.native import has_fast_bf16
from reason_rl.config import ConfigError, RunConfig

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device
    dtype: torch.dtype
    """Compute dtype."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """Items rank, rank + size, ... of a list that is the same on every rank."""
        return list(items[self.rank :: self.size])

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value)
        return gathered

    def gather_shares(self, part: Sequence[T]) -> list[T]:
        """The inverse of `share`: the full list, in order, on every rank."""
        parts = self.gather(list(part))
        return [parts[i % self.size][i // self.size] for i in range(sum(map(len, parts)))]

    def from_main(self, act: Callable[[], T]) -> T:
        """Calls `act()` on rank 0; every rank returns its result or raises its error, so none hangs."""
        result: T | None = None
        error: Exception | None = None
        if self.is_main:
            try:
                result = act()
            except Exception as raised:
                error = raised
        result, error = self.gather((result, error))[0]
        if error is not None:
            raise error
        return result  # type: ignore[return-value]

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def init_world(run: RunConfig) -> World:
    """Chooses device, dtype and threads, and joins torchrun's process group."""
    # The device.
    size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", size))
    name = run.device if run.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"run.device must be auto, cpu, cuda or cuda:N, got {run.device!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"run.device must be auto, cpu, cuda or cuda:N, got {run.device!r}")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(f"run.device={run.device!r}, but torch {torch.__version__} sees no CUDA device; use --device cpu")
        device = torch.device("cuda", local_rank if size > 1 or device.index is None else device.index)
        if device.index >= torch.cuda.device_count():
            raise ConfigError(f"{device} is needed (run.device={run.device!r}, {local_size} process(es) on this machine), but "
                              f"torch sees {torch.cuda.device_count()} CUDA device(s)")
        torch.cuda.set_device(device)
        # TF32 would round float32 GEMMs (the router's) to 10 mantissa bits, unlike the CPU reference.
        torch.backends.cuda.matmul.allow_tf32 = False

    # Threads, process group, dtype.
    torch.set_num_threads(run.num_threads or _default_threads(local_size))
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    is_bf16_fast = device.type == "cuda" or has_fast_bf16()
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16,
             "auto": torch.bfloat16 if is_bf16_fast else torch.float32}[run.dtype]
    return World(rank, size, device, dtype)


def _default_threads(local_size: int) -> int:
    """The usable cores divided equally among local processes; a single process uses OMP_NUM_THREADS if it is
    set. torchrun sets that to 1 for several processes, so they ignore it."""
    setting = os.environ.get("OMP_NUM_THREADS", "")
    if local_size == 1 and setting.isdigit() and int(setting) > 0:
        return int(setting)
    # sched_getaffinity (Linux only): the cores that this process may use; in a container these can be fewer.
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, num_cores // local_size)


def close_world(world: World) -> None:
    if world.size > 1 and dist.is_initialized():
        dist.destroy_process_group()


def end_process(code: int) -> NoReturn:
    """Exits with this code; under torchrun without Python's finalisation.

    gloo's threads outlive destroy_process_group, because DTensor's caches hold the group. A thread that wakes
    up during finalisation aborts the process (torch 2.13: once in about 80 runs on a busy machine).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        os._exit(code)
    sys.exit(code)
