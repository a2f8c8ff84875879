"""The folder of a run: whether to begin, go on, or say that it is done; and how a run is asked to stop.

`runs/<name>/` belongs to one config. The same command again resumes an unfinished run and leaves a finished one alone;
another config is refused with the difference; `--resume never` begins afresh in the next free folder, `<name>-2`, ...
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kernels.native import ISA
from reason_rl.config import Config, ConfigError, config_difference, dump_config, load_config
from reason_rl.config.load import table_of
from reason_rl.parallel.world import World
from reason_rl.trainer.checkpoint import newest_checkpoint

SUMMARY_FILE = "summary.json"
CONFIG_FILE = "config.toml"
COMPUTE_FILE = "compute.json"


@dataclass(frozen=True)
class RunFolder:
    path: Path
    is_finished: bool
    resume_from: Path | None
    """The newest step checkpoint of an unfinished run."""
    compute: dict[str, str] = field(default_factory=dict)
    """What a run that was begun computes in, dtype and kernels, and a digest of the problems of its files."""

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"


def open_run(config: Config, world: World) -> RunFolder:
    """Rank 0 looks and decides; all ranks get the same answer or the same error. Nothing is written yet."""
    answer: tuple[RunFolder | None, str] = (None, "")
    if world.is_main:
        try:
            answer = (_decide(config), "")
        except ConfigError as error:
            answer = (None, str(error))
    folder, problem = world.gather(answer)[0]
    if folder is None:
        raise ConfigError(problem)
    return folder


def _decide(config: Config) -> RunFolder:
    base = Path(config.run.out_dir) / config.run.name
    path = base
    if config.run.resume == "never":
        number = 2
        while path.exists():
            path = base.with_name(f"{base.name}-{number}")
            number += 1
    written = path / CONFIG_FILE
    if written.is_file():
        differences = [line for line in config_difference(load_config(written), config) if not line.startswith("run.resume:")]
        if differences:
            raise ConfigError(f"{path} holds a run of another config; give this one a --name of its own, or --resume never. "
                              "The differences:\n  " + "\n  ".join(differences))
        begun = path / COMPUTE_FILE
        compute = json.loads(begun.read_text()) if begun.is_file() else {}
        return RunFolder(path, (path / SUMMARY_FILE).is_file(), newest_checkpoint(path / "checkpoints"), compute)
    return RunFolder(path, False, None)


def as_begun(world: World, folder: RunFolder) -> World:
    """The world in the dtype that this run began in: where run.dtype is "auto", another machine or build may choose another."""
    name = folder.compute.get("dtype", "")
    return dataclasses.replace(world, dtype=getattr(torch, name)) if name else world


def begin_run(folder: RunFolder, config: Config, world: World, problems: str) -> None:
    """Write config.toml, what is computed in and the problems' digest, once everything that can fail before work starts has been
    checked: a refused run leaves no trace.

    It holds the folder's own name and resume = "auto", so that a run begun with `--resume never` can be gone on with too.
    """
    written = folder.path / CONFIG_FILE
    if written.is_file():
        return
    own = dataclasses.replace(config, run=dataclasses.replace(config.run, name=folder.path.name, resume="auto"))
    folder.path.mkdir(parents=True, exist_ok=True)
    compute = {"dtype": str(world.dtype).removeprefix("torch."), "kernels": ISA or "reference ops", "problems": problems}
    (folder.path / COMPUTE_FILE).write_text(json.dumps(compute) + "\n")
    partial = folder.path / f".{CONFIG_FILE}.partial"
    partial.write_text(f"# The run as resolved; `torchrun train.py {written}` runs it again.\n\n{dump_config(own)}")
    os.replace(partial, written)


def write_summary(folder: RunFolder, values: dict[str, Any]) -> None:
    """Written last, and whole or not at all: a run with a summary is finished."""
    partial = folder.path / f".{SUMMARY_FILE}.partial"
    partial.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n")
    os.replace(partial, folder.path / SUMMARY_FILE)


def describe_source() -> dict[str, str]:
    """Commit and whether the tree was clean, where the run is from a checkout and there is a git; else both are ""."""
    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
        except OSError:  # no git on this machine
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = git("rev-parse", "HEAD")
    return {"commit": commit, "tree": "" if not commit else "changed" if git("status", "--porcelain") else "clean"}


def config_table(config: Config) -> dict[str, Any]:
    return table_of(config)


class StopSignal:
    """The first Ctrl-C (or SIGTERM, as torchrun sends) asks the run to save and leave; a second one ends it at once."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        self._say("Asked to stop: finishing this step and saving (Ctrl-C again ends at once, unsaved).")

    def __call__(self) -> bool:
        return self._asked
