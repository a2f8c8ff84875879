"""The folder of a run, runs/<name>, and the decision to begin a run, continue it, or report it finished.

A folder belongs to one config. The same command continues an unfinished run and does not change a finished
one. A different config is refused, and the error lists the differences. `--resume never` begins a run in the
next free folder: <name>-2, <name>-3, ...

    config.toml     the resolved recipe        metrics.jsonl timings.jsonl rollouts/ tensorboard/   the log
    compute.json    dtype, kernels, stage keys  checkpoints/<stage>, checkpoints/final              outputs
    summary.json    results; a run that has it is finished                          report.html
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import signal
import subprocess
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from reason_rl.config import Config, ConfigError, config_difference, dump_config, load_config
from reason_rl.parallel.world import World
from reason_rl.report.files import atomic_write_text
from reason_rl.run.stage_folder import StageFolder
from reason_rl.serve import cli

SUMMARY_FILE = "summary.json"
CONFIG_FILE = "config.toml"
COMPUTE_FILE = "compute.json"
STAGES_FOLDER = "stages"


@dataclass(frozen=True)
class RunFolder:
    path: Path
    is_finished: bool = False
    is_begun: bool = False
    compute: Mapping[str, str] = field(default_factory=dict)
    """dtype, kernels and a digest of the file tasks' problems, when the run began."""
    stage_keys: Mapping[str, str] = field(default_factory=dict)
    """Stage name -> the name of its folder."""

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def stage_folder(self, name: str) -> StageFolder:
        return StageFolder(self.path.parent / STAGES_FOLDER / self.stage_keys[name])


def open_run(config: Config, world: World) -> RunFolder:
    """Rank 0 decides, and all ranks get its result or its error. Writes nothing."""
    return world.from_main(lambda: _decide(config))


def _decide(config: Config) -> RunFolder:
    # The folder: run.name, or with --resume never the first free name.
    base = Path(config.run.out_dir) / config.run.name
    path = base
    if config.run.resume == "never":
        number = 2
        while path.exists():
            path = base.with_name(f"{base.name}-{number}")
            number += 1

    # The run in it, if any, must have the same config.
    written = path / CONFIG_FILE
    if not written.is_file():
        return RunFolder(path)
    differences = [line for line in config_difference(load_config(written), config) if not line.startswith("run.resume:")]
    if differences:
        raise ConfigError(f"{path} holds a run of another config: use another --name, or --resume never. "
                          "The differences:\n  " + "\n  ".join(differences))
    begun = json.loads((path / COMPUTE_FILE).read_text(encoding="utf-8"))
    return RunFolder(path, (path / SUMMARY_FILE).is_file(), True, begun["compute"], begun["stages"])


def as_begun(world: World, folder: RunFolder) -> World:
    """The world with the dtype that the run began with: "auto" may choose another one on another machine."""
    name = folder.compute.get("dtype", "")
    return dataclasses.replace(world, dtype=getattr(torch, name)) if name else world


def begin_folder(folder: RunFolder, config: Config) -> None:
    """Writes compute.json, then config.toml: a folder with config.toml holds a run.

    In config.toml run.name is the folder's name and run.resume is "auto", so `train.py config.toml` continues
    a run that began with `--resume never`.
    """
    if folder.is_begun:
        return
    own = dataclasses.replace(config, run=dataclasses.replace(config.run, name=folder.path.name, resume="auto"))
    folder.path.mkdir(parents=True, exist_ok=True)
    begun = {"compute": dict(folder.compute), "stages": dict(folder.stage_keys)}
    atomic_write_text(folder.path / COMPUTE_FILE, json.dumps(begun, indent=2) + "\n")
    written = folder.path / CONFIG_FILE
    atomic_write_text(written, f"# The resolved config; `torchrun train.py {written}` continues the run.\n\n{dump_config(own)}")


def describe_source() -> dict[str, str]:
    """The commit, and whether the tree is clean or changed; "" for both outside a git checkout."""
    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
        except OSError:  # no git on this machine
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = git("rev-parse", "HEAD")
    return {"commit": commit, "tree": "" if not commit else "changed" if git("status", "--porcelain") else "clean"}


def how_to_talk(folder: Path, config: Config) -> str:
    """The shell command that samples from the run's model."""
    example = ["a2,b*3,c-1,d-8?"] if config.task.name == "program" else ["--template", config.task.template]
    return shlex.join([sys.executable, "-m", cli.__name__, f"{folder}/checkpoints/final", *example])


class StopSignal:
    """The first Ctrl-C or SIGTERM (torchrun's) asks the run to save and stop; a second one ends it."""

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
