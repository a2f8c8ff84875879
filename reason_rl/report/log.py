"""The run's files: metrics.jsonl, timings.jsonl, rollouts/, TensorBoard events, and W&B when asked for.

The last thing of each step: the loop hands over what it measured, and every line is on disk before the next begins.
metrics.jsonl and rollouts/ hold only what follows from config and seed, so a resumed run's files equal those of an
uninterrupted one: `RunLog(resume_step=n)` first drops what was written after step n. Seconds live in timings.jsonl.
Left out: summary.json and config.toml (the loop's own), and any drawing (report.py, plot.py).
"""

from __future__ import annotations

import importlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

METRICS = "metrics.jsonl"
TIMINGS = "timings.jsonl"
ROLLOUTS = "rollouts"
TENSORBOARD = "tensorboard"
WANDB_ID = "wandb_id"


def finite(value: Any) -> Any:
    """`value` as plain JSON: tensors and numpy scalars become numbers, NaN and infinities None."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, str) or value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "tolist"):  # torch and numpy, scalars and arrays
        return finite(value.tolist())
    if isinstance(value, Sequence):
        return [finite(item) for item in value]
    raise ValueError(f"a metric must be a number, text, list or mapping, got {type(value).__name__}")


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file; [] when it is absent. A torn last line (a run killed while writing) is left out."""
    path = Path(path)
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").rstrip("\n").split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number}: expected a JSON object, got {line[:60]!r}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: expected a JSON object, got {line[:60]!r}")
        rows.append(row)
    return rows


def rollout_path(folder: str | Path, step: int) -> Path:
    return Path(folder) / ROLLOUTS / f"step_{step:06d}.jsonl"


def rollout_steps(folder: str | Path) -> list[int]:
    """Steps whose rollouts were written, ascending."""
    return sorted(int(path.stem.removeprefix("step_")) for path in (Path(folder) / ROLLOUTS).glob("step_*.jsonl"))


class RunLog:
    """Writes one run's folder; lines are flushed as they come.

    `resume_step=None` begins the folder's log anew. `resume_step=n` continues it: what was logged after RL step n
    (rl and eval lines, rollouts) is dropped, everything of the pretraining stays.
    """

    def __init__(
        self,
        folder: str | Path,
        tensorboard: bool = True,
        wandb_project: str = "",
        config_dict: Mapping[str, Any] | None = None,
        resume_step: int | None = None,
    ) -> None:
        self.folder = Path(folder)
        self._resume_step = resume_step
        wandb = _import_wandb(wandb_project) if wandb_project else None  # before anything on disk changes
        self._tensorboard = _import_summary_writer() if tensorboard else None
        self._writers: dict[str, Any] = {}
        (self.folder / ROLLOUTS).mkdir(parents=True, exist_ok=True)
        for name in (METRICS, TIMINGS):
            _keep_until(self.folder / name, resume_step)
        for step in rollout_steps(self.folder):
            if resume_step is None or step > resume_step:
                rollout_path(self.folder, step).unlink()
        if resume_step is None:
            for stale in (self.folder / TENSORBOARD).glob("*/events.out.tfevents.*"):
                stale.unlink()
        self._files: dict[str, TextIO] = {
            name: (self.folder / name).open("a", encoding="utf-8") for name in (METRICS, TIMINGS)}
        self._wandb = _start_wandb(wandb, wandb_project, self.folder, config_dict, resume_step) if wandb else None

    def metrics(self, phase: str, step: int, values: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl; `values` must follow from config and seed alone."""
        self._write(METRICS, phase, step, values)
        self._publish(phase, step, values)

    def timings(self, phase: str, step: int, values: Mapping[str, Any]) -> None:
        """One line of timings.jsonl: seconds (`*_s`) and tokens per second (`*_tok_s`)."""
        self._write(TIMINGS, phase, step, values)
        self._publish(phase, step, {f"time/{key}": value for key, value in values.items()})

    def rollouts(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """rollouts/step_NNNNNN.jsonl, one line a completion; whole or not at all."""
        path = rollout_path(self.folder, step)
        scratch = path.with_suffix(".tmp")
        lines = [json.dumps(finite(row), allow_nan=False) + "\n" for row in rows]
        scratch.write_text("".join(lines), encoding="utf-8")
        os.replace(scratch, path)

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        for writer in self._writers.values():
            writer.close()
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _write(self, name: str, phase: str, step: int, values: Mapping[str, Any]) -> None:
        clash = {"phase", "step"} & set(values)
        if clash:
            raise ValueError(f"{name}: values must not hold {sorted(clash)}, they are arguments of their own")
        line = json.dumps({"phase": phase, "step": step, **finite(values)}, allow_nan=False)
        self._files[name].write(line + "\n")
        self._files[name].flush()

    def _publish(self, phase: str, step: int, values: Mapping[str, Any]) -> None:
        """The numbers among `values` to TensorBoard and W&B."""
        numbers = dict(_numbers(finite(values)))
        if self._tensorboard is not None:
            if phase not in self._writers:
                # A folder each, since purge_step hides everything of its folder from that step on: pretraining stays.
                purge = None if self._resume_step is None or phase == "pretrain" else self._resume_step + 1
                self._writers[phase] = self._tensorboard(str(self.folder / TENSORBOARD / phase), purge_step=purge)
            for key, value in numbers.items():
                self._writers[phase].add_scalar(key, value, step)
        if self._wandb is not None:
            self._wandb.log({f"{phase}/step": step, **{f"{phase}/{key}": value for key, value in numbers.items()}})


def _numbers(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, float]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            yield f"{prefix}{key}", float(value)


def _keep_until(path: Path, resume_step: int | None) -> None:
    """Rewrite a log with the lines of pretraining and of steps <= resume_step; None empties it."""
    if not path.exists():
        return
    rows = [] if resume_step is None else [
        row for row in read_jsonl(path) if row.get("phase") == "pretrain" or row.get("step", 0) <= resume_step]
    scratch = path.with_suffix(".tmp")
    scratch.write_text("".join(json.dumps(finite(row)) + "\n" for row in rows), encoding="utf-8")
    os.replace(scratch, path)


def _import_summary_writer() -> Any:
    try:
        return importlib.import_module("torch.utils.tensorboard").SummaryWriter
    except ImportError as error:
        raise ValueError("run.tensorboard = true needs the tensorboard package: `pip install tensorboard`, "
                         "or pass --run.tensorboard=false") from error


def _import_wandb(project: str) -> Any:
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise ValueError(f"run.wandb_project = {project!r} needs the wandb package: `pip install wandb`, "
                         "or leave run.wandb_project empty") from error


def _start_wandb(
    wandb: Any, project: str, folder: Path, config: Mapping[str, Any] | None, resume_step: int | None
) -> Any:
    """A W&B run; a resumed run continues the one whose id lies in its folder. Each phase has its own step axis."""
    note = folder / WANDB_ID
    known = note.read_text().strip() if resume_step is not None and note.is_file() else None
    run = wandb.init(
        project=project, name=folder.name, config=dict(config or {}), dir=str(folder), id=known, resume="allow")
    note.write_text(run.id + "\n")
    for phase in ("pretrain", "rl", "eval"):
        run.define_metric(f"{phase}/*", step_metric=f"{phase}/step")
    return run
