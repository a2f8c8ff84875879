"""Trains a preset from random weights with several seeds and checks the project's promises.

    python -m bench.learning --json bench/results/program_cpu.json --plot program.png
    python -m bench.learning --preset countdown --json bench/results/countdown_cpu.json --plot countdown.png

Each seed is one process of train.py in an empty folder, so pretraining is included. To test a change of RL
only, --bases reuses the base models of an earlier call. The record has the summary and evaluation curve of
every seed, and the machine. Left out: a selection of seeds; all seeds are reported.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.harness import CHECKOUT, add_json_option, describe_setting, write_json
from bench.plot import plot_runs, stage_evaluations


@dataclass(frozen=True)
class Promise:
    config: str | None
    seeds: tuple[int, ...]
    most_base_accuracy: float
    least_final_accuracy: float
    least_thinking_ratio: float
    least_format_rate: float
    most_wall_s: float
    most_logprob_gap: float = 1e-4
    """Nats between sampler and trainer, the largest over all steps."""
    least_problems: int = 500
    """Held-out problems of the first and the last evaluation, each with `least_samples` samples or more."""
    least_samples: int = 4


PROMISES = {
    "program": Promise(None, (0, 1, 2), 0.28, 0.88, 3.0, 0.97, 8 * 60),
    "countdown": Promise("configs/countdown_cpu.toml", (0,), 0.35, 0.80, 0.0, 0.0, 25 * 60),
}
SHOWN = ("base_accuracy", "final_accuracy", "base_mean_thinking_tokens", "final_mean_thinking_tokens", "final_format_rate",
         "max_abs_logprob_gap", "wall_s")


def run_seed(preset: str, promise: Promise, seed: int, out_dir: Path, extra: list[str]) -> tuple[dict[str, Any], Path]:
    """Trains one seed -> (its summary, with the evaluation curve of the last stage; its run folder)."""
    # Train.
    name = f"{preset}-seed{seed}"
    command = [sys.executable, "train.py", *([promise.config] if promise.config else []), "--seed", str(seed), "--name", name,
               f"--run.out_dir={out_dir}", *extra]
    print(" ".join(command[1:]), flush=True)
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"train.py exited with status {done.returncode}:\n{done.stderr[-2000:]}")

    # Read the results.
    folder = out_dir / name
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    keys = ("step", "problems", "samples", "accuracy", "mean_thinking_tokens", "thinks_share", "accuracy_given_thought",
            "accuracy_given_none", "format_rate")
    return summary | {"curve": [{key: line[key] for key in keys} for line in stage_evaluations(folder)]}, folder


def unkept(summary: dict[str, Any], promise: Promise) -> list[str]:
    """The promises that a seed broke, as text. A missing number breaks its promise."""
    # Numbers that the summary does not have.
    base_tokens, final_tokens = summary.get("base_mean_thinking_tokens"), summary.get("final_mean_thinking_tokens")
    ratio = None if base_tokens is None or final_tokens is None else final_tokens / max(base_tokens, 1e-9)
    ends = [summary["curve"][0], summary["curve"][-1]] if summary.get("curve") else []

    # Upper limits, then lower limits.
    at_most = (("base accuracy", summary.get("base_accuracy"), promise.most_base_accuracy),
               ("logprob gap", summary.get("max_abs_logprob_gap"), promise.most_logprob_gap),
               ("seconds", summary.get("wall_s"), promise.most_wall_s))
    at_least = (("final accuracy", summary.get("final_accuracy"), promise.least_final_accuracy),
                ("growth of thinking", ratio, promise.least_thinking_ratio),
                ("format", summary.get("final_format_rate"), promise.least_format_rate),
                ("held-out problems", min((row["problems"] for row in ends), default=None), promise.least_problems),
                ("samples of each", min((row["samples"] for row in ends), default=None), promise.least_samples))
    return ([f"{words} {shown(value)} > {limit}" for words, value, limit in at_most if value is None or not value <= limit]
            + [f"{words} {shown(value)} < {limit}" for words, value, limit in at_least if value is None or not value >= limit])


def shown(value: float | None) -> str:
    return "(none)" if value is None else f"{value:.4g}"


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """-> (options, the arguments for train.py)"""
    parser = argparse.ArgumentParser(prog="python -m bench.learning", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", choices=sorted(PROMISES), default="program")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: the preset's")
    parser.add_argument("--out-dir", type=Path, help="an empty folder for the runs (default: a temporary one)")
    parser.add_argument("--bases", type=Path, help="reuse the pretrain stages in this folder, OUT_DIR/stages of an earlier call; "
                        "wall_s still includes the seconds of their pretraining")
    parser.add_argument("--plot", help="write the curves to this PNG")
    add_json_option(parser)
    options, extra = parser.parse_known_args(arguments)
    options.out_dir = options.out_dir or Path(tempfile.mkdtemp(prefix="reason_rl-"))
    if options.out_dir.exists() and any(options.out_dir.iterdir()):
        parser.error(f"--out-dir: must be an empty folder, so that no stage is reused, got {options.out_dir}")
    return options, extra


def main(arguments: list[str] | None = None) -> int:
    # Options, and base models to reuse.
    options, extra = parse(arguments)
    promise, setting = PROMISES[options.preset], describe_setting()
    for base in sorted(options.bases.glob("pretrain-*")) if options.bases else ():
        shutil.copytree(base, options.out_dir / "stages" / base.name)

    # Each seed.
    summaries, folders, num_broken = [], [], 0
    for seed in options.seeds or promise.seeds:
        summary, folder = run_seed(options.preset, promise, seed, options.out_dir, extra)
        summaries.append(summary)
        folders.append(folder)
        failures = unkept(summary, promise)
        num_broken += bool(failures)
        print(f"seed {seed}: " + "  ".join(f"{key} {shown(summary.get(key))}" for key in SHOWN) + "  "
              + ("kept" if not failures else "NOT KEPT: " + "; ".join(failures)), flush=True)

    # Plot and record.
    if options.plot:
        plot_runs(folders, options.plot)
    write_json({"bench": "learning", "preset": options.preset, "arguments": extra,
                "bases": "reused" if options.bases else "pretrained", "promise": vars(promise), "seeds": summaries,
                "setting": setting}, options.json)
    return 1 if num_broken else 0


if __name__ == "__main__":
    sys.exit(main())
