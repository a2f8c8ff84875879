"""Where a run computes, and how its processes work together.

One process: a plain module on one device. Several (torchrun): FSDP2's `fully_shard` per block, so that each rank holds a
share of every parameter, gradient and optimizer state; gloo on the CPU, nccl on GPUs. What ranks tell each other beyond that
are small Python objects (graded groups, metrics), gathered on the CPU.

Every rank makes the same decisions from the same gathered facts; there is no rank whose word the others await.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
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
        """Items rank, rank + size, ...: this rank's part of a list that every rank knows."""
        return list(items[self.rank :: self.size])

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in order of rank."""
        if self.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value)
        return gathered

    def gather_shares(self, part: Sequence[T]) -> list[T]:
        """The inverse of `share`: the whole list, in its order, on every rank."""
        parts = self.gather(list(part))
        return [parts[i % self.size][i // self.size] for i in range(sum(map(len, parts)))]

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def init_world(run: RunConfig) -> World:
    """Device, dtype, threads and process group, from the config and torchrun's environment."""
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
            raise ConfigError(f"{device} was asked for (run.device={run.device!r}, {local_size} process(es) on this machine), but "
                              f"torch sees {torch.cuda.device_count()} CUDA device(s)")
        torch.cuda.set_device(device)
        # TF32 would round the float32 parts (router, norms' inputs) differently from the CPU reference.
        torch.backends.cuda.matmul.allow_tf32 = False
    torch.set_num_threads(run.num_threads or _default_threads(local_size))
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    is_bf16_fast = device.type == "cuda" or has_fast_bf16()
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16,
             "auto": torch.bfloat16 if is_bf16_fast else torch.float32}[run.dtype]
    return World(rank, size, device, dtype)


def _default_threads(local_size: int) -> int:
    """A process's share of the cores it may use; OMP_NUM_THREADS for one alone (torchrun sets it to 1 for several)."""
    wished = os.environ.get("OMP_NUM_THREADS", "")
    if local_size == 1 and wished.isdigit() and int(wished) > 0:
        return int(wished)
    # Not every system can say which cores a process may use.
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, num_cores // local_size)


def close_world(world: World) -> None:
    if world.size > 1 and dist.is_initialized():
        dist.destroy_process_group()


def end_process(code: int) -> NoReturn:
    """Leave with this exit code; under torchrun without Python's own finalisation.

    gloo's threads live on after destroy_process_group (DTensor's caches hold the group), and one that wakes up while the
    interpreter is taken down aborts the process: seen with torch 2.13, once in some 80 runs on a busy machine.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        os._exit(code)
    sys.exit(code)
