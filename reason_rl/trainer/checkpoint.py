"""Checkpoints: a Hugging Face folder (weights, config.json, tokenizer) plus trainer.pt to go on from, and the stage's log.

A folder is written under another name and renamed when it is whole, so that a folder that is there is complete, at every moment.
The state is whole tensors: a run may resume with another number of processes.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from reason_rl.data import Tokenizer
from reason_rl.model.transformer import Transformer
from reason_rl.model.weights import Source, load_weights, save_weights
from reason_rl.parallel.fsdp import full_state
from reason_rl.parallel.world import World
from reason_rl.records import ConfigError
from reason_rl.report.files import atomic_folder
from reason_rl.trainer.optimizer import Optimizer

STATE_FILE = "trainer.pt"
STEP_PREFIX = "step_"


@dataclass(frozen=True)
class Progress:
    """How far a stage has come; with the config it determines everything that follows, for all randomness is keyed.

    `Progress(num_steps=20, policy_version=40, seconds={"grpo_s": 7.1, "eval_s": 1.9})`
    """

    num_steps: int
    """Steps done."""
    policy_version: int
    """Optimizer updates done."""
    seconds: dict[str, float]
    """Wall-clock so far by part, over all sessions."""


def step_folder(folder: Path, num_done: int) -> Path:
    return folder / f"{STEP_PREFIX}{num_done:06d}"


def save_checkpoint(
    folder: Path, model: Transformer, world: World, tokenizer: Tokenizer, progress: Progress, *,
    optimizer: Optimizer | None = None, files: Mapping[str, str] | None = None, source: Source | None = None,
) -> None:
    """A collective; rank 0 writes, in place of a folder of that name.

    optimizer: with it, training can go on from here. files: further text files, by name. source: what the folder that the model
    was loaded from hands on to this one.
    """
    state = full_state(model)
    optimizer_state = optimizer.state_dict() if optimizer is not None else None

    def write() -> None:
        with atomic_folder(folder) as partial:
            save_weights(partial, state, model.config, model.vocab_size, tokenizer.eos_id, source)
            (partial / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
            for name, text in (files or {}).items():
                (partial / name).write_text(text, encoding="utf-8")
            torch.save({"progress": vars(progress), "optimizer": optimizer_state}, partial / STATE_FILE)

    world.from_main(write)


def step_folders(folder: Path) -> list[Path]:
    """The step checkpoints in `folder`, by number."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if path.is_dir() and re.fullmatch(rf"{STEP_PREFIX}\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix(STEP_PREFIX)))


def newest_checkpoint(folder: Path) -> Path | None:
    return next(reversed(step_folders(folder)), None)


def prune_checkpoints(folder: Path, keep: int, world: World) -> None:
    """Removes all step checkpoints but the newest `keep`, and what a killed process had not finished writing."""
    def prune() -> None:
        for old in (*step_folders(folder)[:-keep], *folder.glob(".*.partial")):
            shutil.rmtree(old)

    world.from_main(prune)


def link_folder(source: Path, target: Path) -> None:
    """`target` with the files of `source` as hard links (copies where the file system has none), in place of an older one."""
    with atomic_folder(target) as partial:
        shutil.copytree(source, partial, dirs_exist_ok=True, copy_function=_link_or_copy)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def read_state(folder: Path) -> dict[str, Any]:
    path = folder / STATE_FILE
    if not path.is_file():
        raise ConfigError(f"cannot resume from {folder}: it has no {STATE_FILE}")
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        Progress(**state["progress"])
    except Exception as error:  # torch.load raises many classes for a damaged file; each means the same to the user
        raise ConfigError(f"cannot resume from {folder}: {STATE_FILE} is damaged ({error}); "
                         "delete the folder to go on from the one before it") from error
    return state


def read_progress(folder: Path) -> Progress:
    return Progress(**read_state(folder)["progress"])


def load_checkpoint(folder: Path, model: Transformer) -> tuple[Progress, Any]:
    """Weights into `model` (not yet sharded) -> (progress, optimizer state for `Optimizer.load_state_dict`)."""
    load_weights(folder, model)
    state = read_state(folder)
    return Progress(**state["progress"]), state["optimizer"]
