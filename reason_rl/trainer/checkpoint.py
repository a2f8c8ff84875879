"""Checkpoints: a Hugging Face folder (weights, config.json, tokenizer.json and its like) plus trainer.pt to go on from.

Written beside its final name and renamed when whole, so that a folder that is there is complete. The state is whole tensors:
a run may resume with another number of processes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from reason_rl.model.transformer import Transformer
from reason_rl.model.weights import Source, load_weights, save_weights
from reason_rl.parallel.fsdp import full_state
from reason_rl.parallel.world import World
from reason_rl.trainer.optimizer import Optimizer

STATE_FILE = "trainer.pt"
STEP_PREFIX = "step_"


@dataclass(frozen=True)
class Progress:
    """Where a phase stands; with the config it determines everything that comes (all randomness is keyed)."""

    phase: str
    """pretrain | rl"""
    step: int
    """Updates (pretrain) or steps (rl) done."""
    policy_version: int
    seconds: dict[str, float]
    """Wall-clock spent so far by part of the run, over all its sessions."""


def step_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"{STEP_PREFIX}{step:06d}"


def save_checkpoint(
    folder: Path, model: Transformer, world: World, *, tokenizer_json: str, eos_id: int,
    optimizer: Optimizer | None = None, progress: Progress | None = None, extra: Mapping[str, str] | None = None,
    source: Source | None = None, replace: bool = True,
) -> None:
    """A collective; rank 0 writes. `extra`: further text files by name; `source`: what the folder the model came from passes on.
    replace=False keeps a folder that is there already."""
    state = full_state(model)
    optimizer_state = optimizer.state_dict() if optimizer is not None else None
    if world.is_main:
        partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")  # nobody else writes there
        shutil.rmtree(partial, ignore_errors=True)
        save_weights(partial, state, model.config, model.vocab_size, eos_id, source)
        (partial / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
        for name, text in (extra or {}).items():
            (partial / name).write_text(text)
        if progress is not None:
            torch.save({"progress": vars(progress), "optimizer": optimizer_state}, partial / STATE_FILE)
        if folder.exists() and replace:
            shutil.rmtree(folder)
        if folder.exists():
            shutil.rmtree(partial)
        else:
            os.replace(partial, folder)
    world.barrier()


def newest_checkpoint(checkpoints: Path) -> Path | None:
    found = sorted(checkpoints.glob(f"{STEP_PREFIX}[0-9]*")) if checkpoints.is_dir() else []
    return found[-1] if found else None


def prune_checkpoints(checkpoints: Path, keep: int, world: World) -> None:
    if world.is_main:
        for old in sorted(checkpoints.glob(f"{STEP_PREFIX}[0-9]*"))[:-keep]:
            shutil.rmtree(old)


def read_state(folder: Path) -> dict[str, Any]:
    path = folder / STATE_FILE
    if not path.is_file():
        raise ValueError(f"cannot resume from {folder}: it has no {STATE_FILE}")
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        Progress(**state["progress"])
    except Exception as error:  # torch.load raises many kinds on a damaged file; each means the same to the user
        raise ValueError(f"cannot resume from {folder}: {STATE_FILE} is damaged ({error}); "
                         "delete the folder to go on from the one before it") from error
    return state


def load_checkpoint(folder: Path, model: Transformer) -> tuple[Progress, Any]:
    """Weights into `model` (not yet sharded) -> (progress, optimizer state for `Optimizer.load_state_dict`)."""
    load_weights(folder, model)
    state = read_state(folder)
    return Progress(**state["progress"]), state["optimizer"]
