"""Run a preset from random weights on several seeds, and hold what was learned against what the project promises.

    python -m bench.learning --json bench/results/program_cpu.json --plot docs/program.png
    python -m bench.learning --preset countdown --json bench/results/countdown_cpu.json --plot docs/countdown.png

Each seed is a run of train.py in a process of its own, in an empty folder, so its base model is pretrained too (but see
--bases, for a change that concerns RL alone). The record holds
every seed's summary and evaluation curve, and the machine. Left out: choosing seeds; they are the ones named, all shown.
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
from bench.plot import plot_runs
from reason_rl.report.log import METRICS, read_jsonl


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
    """Nats, sampler against trainer, over all steps."""
    least_problems: int = 500
    """Held-out, in the first and the last evaluation, each with at least `least_samples` samples."""
    least_samples: int = 4


PROMISES = {
    "program": Promise(None, (0, 1, 2), 0.28, 0.88, 3.0, 0.97, 8 * 60),
    "countdown": Promise("configs/countdown_cpu.toml", (0,), 0.35, 0.80, 0.0, 0.0, 25 * 60),
}
SHOWN = ("base_accuracy", "final_accuracy", "base_mean_thinking_tokens", "final_mean_thinking_tokens", "final_format_rate",
         "max_abs_logprob_gap", "wall_s")


def run_seed(preset: str, promise: Promise, seed: int, out_dir: Path, extra: list[str]) -> tuple[dict[str, Any], Path]:
    """-> (summary with its evaluation curve, run folder)."""
    name = f"{preset}-seed{seed}"
    command = [sys.executable, "train.py", *([promise.config] if promise.config else []), "--seed", str(seed), "--name", name,
               f"--run.out_dir={out_dir}", *extra]
    print(" ".join(command[1:]), flush=True)
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"train.py ended with {done.returncode}:\n{done.stderr[-2000:]}")
    folder = out_dir / name
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    rows = [row for row in read_jsonl(folder / METRICS) if row["phase"] == "eval"]
    keys = ("step", "problems", "samples", "accuracy", "mean_thinking_tokens", "thinks_share", "accuracy_given_thought",
            "accuracy_given_none", "format_rate")
    return summary | {"curve": [{key: row[key] for key in keys} for row in rows]}, folder


def unkept(summary: dict[str, Any], promise: Promise) -> list[str]:
    """What a seed promised and did not keep, in words. A figure that is missing keeps nothing."""
    base_tokens, final_tokens = summary.get("base_mean_thinking_tokens"), summary.get("final_mean_thinking_tokens")
    ratio = None if base_tokens is None or final_tokens is None else final_tokens / max(base_tokens, 1e-9)
    ends = [summary["curve"][0], summary["curve"][-1]] if summary.get("curve") else []
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


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.learning", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", choices=sorted(PROMISES), default="program")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: the preset's")
    parser.add_argument("--out-dir", type=Path, help="an empty folder for the runs (default: a temporary one)")
    parser.add_argument("--bases", type=Path, help="take base models of the same config from this folder (an earlier run's); "
                        "wall_s still counts the seconds that each took to pretrain")
    parser.add_argument("--plot", help="write the curve to this PNG")
    add_json_option(parser)
    options, extra = parser.parse_known_args(arguments)
    promise = PROMISES[options.preset]
    out_dir = options.out_dir or Path(tempfile.mkdtemp(prefix="reason_rl-"))
    if out_dir.exists() and any(out_dir.iterdir()):
        parser.error(f"--out-dir must be empty, so that no base model is reused: {out_dir}")
    if options.bases:
        out_dir.mkdir(parents=True, exist_ok=True)
        shutil.copytree(options.bases, out_dir / "bases")
    setting = describe_setting()
    summaries, folders, broken = [], [], 0
    for seed in options.seeds or promise.seeds:
        summary, folder = run_seed(options.preset, promise, seed, out_dir, extra)
        summaries.append(summary)
        folders.append(folder)
        failures = unkept(summary, promise)
        broken += bool(failures)
        print(f"seed {seed}: " + "  ".join(f"{key} {shown(summary.get(key))}" for key in SHOWN) + "  "
              + ("kept" if not failures else "NOT KEPT: " + "; ".join(failures)), flush=True)
    if options.plot:
        plot_runs(folders, options.plot)
    write_json({"bench": "learning", "preset": options.preset, "arguments": extra,
                "bases": "reused" if options.bases else "pretrained", "promise": vars(promise), "seeds": summaries,
                "setting": setting}, options.json)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
