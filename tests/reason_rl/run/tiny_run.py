"""A run small enough for a test: one layer, seconds of pretraining, a few RL steps; in this process or another."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import train
from reason_rl.config import parse_command_line

ROOT = Path(__file__).resolve().parents[3]
SETTINGS = """
[run]
name = "tiny"
num_threads = 1
dtype = "float32"
checkpoint_every = 2
rollout_every = 2
[model]
num_hidden_layers = 1
hidden_size = 32
num_attention_heads = 2
num_key_value_heads = 1
head_dim = 16
num_experts = 4
moe_intermediate_size = 24
expert_bias = true
max_position_embeddings = 64
[task]
min_level = 2
max_level = 3
heldout_share = 0.1
rl_share = 0.2
[pretrain]
steps = 24
tokens_per_step = 256
expert_bias_rate = 0.01
[pretrain_optim]
warmup_steps = 4
[rl]
steps = 5
prompts_per_step = 4
group_size = 4
num_minibatches = 2
[optim]
lr = 1e-3
microbatch_tokens = 128
[sampling]
max_tokens = 20
[reward]
custom = "tests.reason_rl.run.train_rewards:by_hash"
[eval]
every = 2
problems = 6
samples = 2
final_problems = 8
final_samples = 2
pass_at_k = 4
"""


FAR_FROM_DEFAULT = [
    "--model.num_hidden_layers=2", "--model.num_dense_layers=1", "--model.intermediate_size=20", "--model.num_shared_experts=1",
    "--model.attention_bias=all", "--model.qk_norm=full", "--model.routed_scaling_factor=1.5", "--model.partial_rotary_factor=0.5",
    "--model.router_score=sigmoid", "--rl.routing_replay=true", "--run.exact=on"]
"""Every switch that a model may have set otherwise; only sampling op by op covers it."""


def arguments(out_dir: Path, *more: str) -> list[str]:
    """Command line of the tiny run, which writes under `out_dir`; its TOML file is there too."""
    toml = out_dir / "tiny.toml"
    if not toml.exists():
        out_dir.mkdir(parents=True, exist_ok=True)
        toml.write_text(SETTINGS)
    return [str(toml), f"--run.out_dir={out_dir}", *more]


def run_here(out_dir: Path, *more: str) -> int:
    return train.main(parse_command_line(arguments(out_dir, *more)))


def run_apart(out_dir: Path, *more: str, processes: int = 1, start: bool = False) -> Any:
    """Runs in a new process, or in several under torchrun. start: return the running process instead of waiting."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [*launcher, str(ROOT / "train.py"), *arguments(out_dir, *more)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NO_COLOR": "1", "PYTHONPATH": str(ROOT)}
    settings: dict[str, Any] = {"cwd": ROOT, "env": environment, "text": True}
    if start:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **settings)
    return subprocess.run(command, capture_output=True, timeout=300, check=False, **settings)


def stop_after(monkeypatch: pytest.MonkeyPatch, num_questions: int) -> None:
    """Ctrl-C as the loop sees it: should_stop() returns True from the given call on."""
    asked = [0]

    def should_stop() -> bool:
        asked[0] += 1
        return asked[0] >= num_questions

    monkeypatch.setattr(train, "StopSignal", lambda say: should_stop)


def never_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real StopSignal would take over pytest's own Ctrl-C."""
    monkeypatch.setattr(train, "StopSignal", lambda say: lambda: False)


def rows(folder: Path, name: str = "metrics.jsonl", stage: str = "", phase: str = "") -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if (not stage or line["stage"] == stage) and (not phase or line["phase"] == phase)]


def stage_folder(out_dir: Path, name: str) -> Path:
    """The one folder of a stage's output in `out_dir`."""
    (folder,) = (path for path in (out_dir / "stages").glob(f"{name}-*") if path.is_dir())
    return folder


def forget(out_dir: Path, *names: str) -> None:
    """Removes the tiny run and these stages' outputs, so that the next run makes them again."""
    shutil.rmtree(out_dir / "tiny", ignore_errors=True)
    for name in names:
        shutil.rmtree(stage_folder(out_dir, name))


def fingerprints(folder: Path) -> dict[str, str]:
    """Of all that must be equal between two runs of one config, interrupted or not: metrics, rollouts, final weights."""
    paths = [folder / "metrics.jsonl", *sorted((folder / "rollouts").rglob("*.jsonl")),
             *sorted((folder / "checkpoints/final").iterdir())]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths
            if path.name not in ("trainer.pt", "timings.jsonl")}  # they hold seconds


def said(capsys: pytest.CaptureFixture[str], act: Callable[[], int]) -> tuple[int, str]:
    capsys.readouterr()
    code = act()
    return code, capsys.readouterr().out


__all__: Sequence[str] = ["ROOT", "arguments", "fingerprints", "forget", "never_stop", "rows", "run_apart", "run_here", "said",
                          "stage_folder", "stop_after"]
