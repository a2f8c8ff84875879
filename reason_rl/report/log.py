"""The log of a run: metrics.jsonl, timings.jsonl, rollouts/, TensorBoard events and, when configured, W&B.

The loop logs each step once its numbers are known, one flushed line each:

    {"stage": "grpo", "phase": "train", "step": 7, "reward": 0.41, ...}

Phase "train" is an optimizer step, counted from 1. Phase "eval" is an evaluation after `step` steps; 0 is one
before the first. metrics.jsonl and rollouts/ depend on config and seed only, so a run that was interrupted
and continues with `restore` has the files of an uninterrupted one. timings.jsonl holds the seconds. Left out:
summary.json, config.toml (run/) and the page (page.py).
"""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TextIO

from reason_rl.records import ConfigError
from reason_rl.report.files import Row, atomic_write_text, finite, jsonl, read_jsonl

METRICS = "metrics.jsonl"
TIMINGS = "timings.jsonl"
ROLLOUTS = "rollouts"
TENSORBOARD = "tensorboard"
WANDB_ID = "wandb_id"
Phase = Literal["train", "eval"]
PHASES: tuple[Phase, ...] = ("train", "eval")


def read_log(folder: str | Path, name: str, *, stage: str = "", phase: str = "") -> list[Row]:
    """The lines of metrics.jsonl or timings.jsonl as logged, of one stage or phase if given."""
    path = Path(folder) / name
    lines = read_jsonl(path)
    for number, line in enumerate(lines, start=1):
        if missing := {"stage", "phase", "step"} - set(line):
            raise ConfigError(f"{path}, line {number}: expected the keys stage, phase and step, got none for {sorted(missing)}")
    return [line for line in lines if stage in ("", line["stage"]) and phase in ("", line["phase"])]


def rollout_path(folder: str | Path, stage: str, step: int) -> Path:
    return Path(folder) / ROLLOUTS / stage / f"step_{step:06d}.jsonl"


def rollout_steps(folder: str | Path, stage: str) -> list[int]:
    """The steps of a stage that have a rollouts file, ascending."""
    return sorted(int(path.stem.removeprefix("step_")) for path in (Path(folder) / ROLLOUTS / stage).glob("step_*.jsonl"))


class RunLog:
    """Writes the log in one run's folder. It appends to an existing log; `restore` sets a stage back.

        log = RunLog(folder)
        log.metrics("grpo", "train", 1, {"reward": 0.4})
        history = log.history("grpo")      # goes into the stage's checkpoint
        log.restore("grpo", history)       # in a later process, before the stage continues
    """

    def __init__(
        self, folder: str | Path, tensorboard: bool = True, wandb_project: str = "",
        config_dict: Mapping[str, Any] | None = None,
    ) -> None:
        # Both imports come first: a missing package must not change anything on disk.
        wandb = _import_wandb(wandb_project) if wandb_project else None
        summary_writer = _import_summary_writer() if tensorboard else None
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._files: dict[str, TextIO] = {}
        for name in (METRICS, TIMINGS):
            self._rewrite(name, read_log(self.folder, name))  # drops an incomplete last line
        self._tensorboard = _TensorBoard(self.folder / TENSORBOARD, summary_writer) if summary_writer else None
        self._wandb = _Wandb(wandb, wandb_project, self.folder, config_dict) if wandb else None

    def metrics(self, stage: str, phase: Phase, step: int, values: Mapping[str, Any]) -> None:
        """Writes one line of metrics.jsonl; `values` must depend on config and seed only."""
        self._log(METRICS, stage, phase, step, values)

    def timings(self, stage: str, phase: Phase, step: int, values: Mapping[str, Any]) -> None:
        """Writes one line of timings.jsonl: seconds (`*_s`) and tokens per second (`*_tok_s`)."""
        self._log(TIMINGS, stage, phase, step, values)

    def rollouts(self, stage: str, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes rollouts/<stage>/step_NNNNNN.jsonl, one completion a line."""
        path = rollout_path(self.folder, stage, step)
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(path, jsonl(rows))

    def history(self, stage: str) -> dict[str, list[Row]]:
        """{"metrics.jsonl": lines, "timings.jsonl": lines}: everything logged of the stage so far."""
        return {name: read_log(self.folder, name, stage=stage) for name in (METRICS, TIMINGS)}

    def restore(self, stage: str, history: Mapping[str, Sequence[Row]]) -> None:
        """Sets the log back to `history` of this stage: its other lines, and all later stages, are removed.

        So are the rollouts of the later stages, and the stage's own after the history's last step. A finished
        stage that the log already holds must therefore not be restored. The history may come from another run
        that trained the same stage: lines that are new to this log are sent to TensorBoard and W&B.
        """
        if foreign := {str(line["stage"]) for lines in history.values() for line in lines} - {stage}:
            raise ValueError(f"restore: expected lines of stage {stage!r}, got lines of {sorted(foreign)}")
        logged = {name: read_log(self.folder, name) for name in (METRICS, TIMINGS)}
        order = list(dict.fromkeys(line["stage"] for lines in logged.values() for line in lines))
        later = order[order.index(stage) + 1:] if stage in order else []

        # Lines: the stages before, then the history.
        for name, lines in logged.items():
            kept = [line for line in lines if line["stage"] not in (stage, *later)]
            self._rewrite(name, [*kept, *history.get(name, ())])

        # Rollouts.
        last_step = max((line["step"] for line in history.get(METRICS, ())), default=-1)
        for step in rollout_steps(self.folder, stage):
            if step > last_step:
                rollout_path(self.folder, stage, step).unlink()
        for name in later:
            shutil.rmtree(self.folder / ROLLOUTS / name, ignore_errors=True)

        # Events.
        if self._tensorboard is not None:
            self._tensorboard.restore(stage, history.get(METRICS, ()), later)
        for name, lines in logged.items():
            known = {(line["phase"], line["step"]) for line in lines if line["stage"] == stage}
            for line in history.get(name, ()):
                if (line["phase"], line["step"]) not in known:
                    self._publish(name, line)

    def close(self) -> None:
        """May be called twice."""
        for sink in (*self._files.values(), self._tensorboard, self._wandb):
            if sink is not None:
                sink.close()
        self._wandb = None

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _log(self, name: str, stage: str, phase: Phase, step: int, values: Mapping[str, Any]) -> None:
        if clash := {"stage", "phase", "step"} & set(values):
            raise ValueError(f"{name}: values must not hold {sorted(clash)}, which are arguments")
        if phase not in PHASES:
            raise ValueError(f"{name}: expected a phase of {PHASES}, got {phase!r}")
        line = {"stage": stage, "phase": phase, "step": step, **finite(values)}
        self._files[name].write(jsonl([line]))
        self._files[name].flush()
        self._publish(name, line)

    def _rewrite(self, name: str, lines: Sequence[Row]) -> None:
        """Replaces a log by these lines, and opens it again to append."""
        if name in self._files:
            self._files[name].close()
        atomic_write_text(self.folder / name, jsonl(lines))
        self._files[name] = (self.folder / name).open("a", encoding="utf-8")

    def _publish(self, name: str, line: Row) -> None:
        """Sends the numbers of a line to TensorBoard and W&B; those of timings.jsonl get the prefix time/."""
        values = {key: value for key, value in line.items() if key not in ("stage", "phase", "step")}
        numbers = dict(_numbers(values, "time/" if name == TIMINGS else ""))
        for sink in (self._tensorboard, self._wandb):
            if sink is not None:
                sink.add(line["stage"], line["phase"], line["step"], numbers)


class _TensorBoard:
    """One event writer per stage and phase, in tensorboard/<stage>/<phase>: each has its own steps."""

    def __init__(self, folder: Path, summary_writer: Any) -> None:
        self._folder = folder
        self._summary_writer = summary_writer
        self._writers: dict[tuple[str, str], Any] = {}
        self._purge_steps: dict[tuple[str, str], int] = {}
        """The first step that a writer opened from now on hides, with all later ones."""

    def add(self, stage: str, phase: str, step: int, numbers: Mapping[str, float]) -> None:
        key = (stage, phase)
        if key not in self._writers:
            self._writers[key] = self._summary_writer(str(self._folder / stage / phase), purge_step=self._purge_steps.get(key))
        for name, value in numbers.items():
            self._writers[key].add_scalar(name, value, step)

    def restore(self, stage: str, lines: Sequence[Row], later: Sequence[str]) -> None:
        for key in [key for key in self._writers if key[0] in (stage, *later)]:
            self._writers.pop(key).close()
        for name in later:
            shutil.rmtree(self._folder / name, ignore_errors=True)
        for phase in PHASES:
            last_step = max((line["step"] for line in lines if line["phase"] == phase), default=-1)
            self._purge_steps[stage, phase] = last_step + 1

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()


class _Wandb:
    """One W&B run, continued under the id in its folder. Each stage and phase has its own step axis."""

    def __init__(self, wandb: Any, project: str, folder: Path, config: Mapping[str, Any] | None) -> None:
        note = folder / WANDB_ID
        known_id = note.read_text(encoding="utf-8").strip() if note.is_file() else None
        self._run = wandb.init(
            project=project, name=folder.name, config=dict(config or {}), dir=str(folder), id=known_id, resume="allow")
        atomic_write_text(note, self._run.id + "\n")
        self._axes: set[str] = set()

    def add(self, stage: str, phase: str, step: int, numbers: Mapping[str, float]) -> None:
        prefix = f"{stage}/{phase}"
        if prefix not in self._axes:
            self._axes.add(prefix)
            self._run.define_metric(f"{prefix}/*", step_metric=f"{prefix}/step")
        self._run.log({f"{prefix}/step": step, **{f"{prefix}/{key}": value for key, value in numbers.items()}})

    def close(self) -> None:
        self._run.finish()


def _numbers(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, float]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            yield f"{prefix}{key}", float(value)


def _import_summary_writer() -> Any:
    try:
        return importlib.import_module("torch.utils.tensorboard").SummaryWriter
    except ImportError as error:
        raise ConfigError("run.tensorboard = true needs the tensorboard package: `pip install tensorboard`, "
                         "or pass --run.tensorboard=false") from error


def _import_wandb(project: str) -> Any:
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise ConfigError(f"run.wandb_project = {project!r} needs the wandb package: `pip install wandb`, "
                         "or leave run.wandb_project empty") from error
