"""summary.json: results of a finished run. Base and final policy on held-out problems, stages, seconds."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from kernels.native import ISA
from reason_rl.model.hf_config import read_model_config
from reason_rl.model.transformer import Transformer, num_active_parameters, num_parameters
from reason_rl.parallel.world import World
from reason_rl.report.files import atomic_write_text, read_jsonl
from reason_rl.report.log import METRICS
from reason_rl.run.folder import SUMMARY_FILE, RunFolder, describe_source
from reason_rl.run.recipe import PlannedStage
from reason_rl.run.stage_folder import FINAL

Row = Mapping[str, Any]
COMPARED = ("accuracy", "mean_thinking_tokens", "thinks_share", "mean_thinking_tokens_among_thinkers", "format_rate",
            "accuracy_given_thought", "accuracy_given_none", "pass_at_k")
"""Evaluation metrics in the summary, as base_<name> and final_<name>."""


def summarise(folder: RunFolder, recipe: Sequence[PlannedStage], seconds: Mapping[str, float], world: World) -> dict[str, Any]:
    """From metrics.jsonl. base: the first evaluation of the run; final: the last one."""
    # The log, and the model's sizes.
    rows = read_jsonl(folder.path / METRICS)
    with torch.device("meta"):  # shapes without memory
        model = Transformer(*read_model_config(folder.checkpoints / FINAL))
    config, evaluations = recipe[-1].config, [row for row in rows if row["phase"] == "eval"]
    training = [row for row in rows if row["phase"] == "train"]
    gaps = [row["max_abs_logprob_gap"] for row in training if row.get("max_abs_logprob_gap") is not None]

    # The evaluations at both ends.
    summary: dict[str, Any] = {"name": folder.path.name, "task": config.task.name, "seed": config.run.seed}
    if evaluations:
        first, last = evaluations[0], evaluations[-1]
        summary |= {"heldout_problems": last["problems"], "heldout_samples": last["samples"]}
        for name in COMPARED:
            summary |= {f"base_{name}": first.get(name), f"final_{name}": last.get(name)}

    # Steps, stages, time and machine.
    summary |= {
        "max_abs_logprob_gap": max(gaps, default=None), "ungraded": int(sum(row.get("ungraded") or 0 for row in training)),
        "rl_steps": sum(row["stage"] == recipe[-1].name for row in training),
        "stages": [stage_summary(stage, rows) for stage in recipe],
        "wall_s": round(sum(seconds.values()), 2), "seconds": {key: round(value, 2) for key, value in seconds.items()},
        "parameters": num_parameters(model), "active_parameters": num_active_parameters(model),
        "device": str(world.device), "dtype": str(world.dtype).removeprefix("torch."), "kernels": ISA or "reference ops",
        "num_processes": world.size, **describe_source()}
    assert all(not isinstance(value, float) or math.isfinite(value) for value in summary.values())
    return summary


def stage_summary(stage: PlannedStage, rows: Sequence[Row]) -> dict[str, Any]:
    own = [row for row in rows if row["stage"] == stage.name]
    steps = [row["step"] for row in own if row["phase"] == "train"]
    accuracies = [row["accuracy"] for row in own if row["phase"] == "eval"]
    return {"name": stage.name, "kind": stage.kind.kind, "after": stage.after.name if stage.after else "",
            "steps": max(steps, default=0), "final_accuracy": accuracies[-1] if accuracies else None}


def write_summary(folder: Path, values: Mapping[str, Any]) -> None:
    """Written atomically: a run with a summary is finished."""
    atomic_write_text(folder / SUMMARY_FILE, json.dumps(values, indent=2, allow_nan=False) + "\n")
