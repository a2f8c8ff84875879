"""Twenty steps of the default preset on a GPU, through train.py in a separate process: its kernels and its log."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.__main__ import import_ops
from kernels.ahead_of_time import ops_with_triton
from kernels.dispatch import REGISTRY
from tests.reason_rl.run.tiny_run import ROOT, rows

IN_TRAINING = {"attention", "linear", "moe_experts", "moe_route", "rms_norm", "rope"}
IN_ROLLOUTS = {"paged_attention", "sample"}
"""Of a decoder that goes op by op; what a step of an MoE model runs on its device."""
LOSS = {"grpo_loss", "linear_logprob"}, {"linear_grpo_loss"}
"""The one or the other."""
Run = tuple[dict[str, Any], Path]


def default_preset(folder: Path, device: str, *extra: str) -> Run:
    """-> (what tests/gpu_run.py wrote, the run's folder)"""
    record = folder / "record.json"
    command = [sys.executable, "-m", "tests.gpu_run", str(record), f"--run.out_dir={folder}", f"--run.device={device}",
               "--rl.steps=20", "--eval.final_problems=100", "--eval.pass_at_k=0", *extra]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=540, check=False)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return json.loads(record.read_text()), folder / "program"


def plain_though_there_is_a_kernel(chosen: list[list[str]]) -> list[str]:
    """The (op, device, dtype) that ran on the reference although "auto" has another implementation for them."""
    import_ops()
    found = []
    for op, device, dtype, name in chosen:
        able = [i.name for i in REGISTRY[op].implementations
                if i.is_automatic and not i.refusal(torch.device(device), getattr(torch, dtype)) and i.name != "reference"]
        if name == "reference" and able:
            found.append(f"{op} on {device} in {dtype}: reference, though there is {able[0]}")
    return found


def folder_of(op: str) -> str:
    """'paged_attention' -> 'attention', 'moe_route' -> 'moe'"""
    return max((folder for folder in ops_with_triton() if folder in op), key=len)


def kernels_of(folder: str) -> set[str]:
    """The names of its Triton kernels."""
    from triton.runtime import JITFunction

    modules = [importlib.import_module(f"kernels.{folder}.{path.stem}") for path in (ROOT / "kernels" / folder).glob("triton_*.py")]
    return {value.__name__ for module in modules for value in vars(module).values() if isinstance(value, JITFunction)}


def check_run(record: dict[str, Any], folder: Path, steps: int) -> None:
    metrics = rows(folder, stage="grpo", phase="train")
    assert [row["step"] for row in metrics] == list(range(1, steps + 1))
    for row in metrics:
        for key in ("loss", "grad_norm", "reward", "max_abs_logprob_gap"):
            assert math.isfinite(row[key]), (row["step"], key, row[key])
    assert not plain_though_there_is_a_kernel(record["chosen"])
    names = {op for op, *_ in record["chosen"]}
    assert names >= IN_TRAINING and any(names >= loss for loss in LOSS), names


@pytest.fixture(scope="module", params=[("--run.dtype=bfloat16",), ("--run.dtype=float32", "--pretrain.steps=50")], ids=str)
def on_gpu(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return default_preset(tmp_path_factory.mktemp("gpu"), "cuda", *request.param)


@pytest.mark.gpu
def test_twenty_steps_are_finite_and_no_reference_runs_where_there_is_a_kernel(on_gpu: Run):
    record, folder = on_gpu
    check_run(record, folder, 20)
    assert {op for op, device, *_ in record["chosen"] if device == "cuda"} >= IN_TRAINING | IN_ROLLOUTS


@pytest.mark.gpu
def test_the_profiler_lists_the_kernels_of_every_op_that_triton_ran(on_gpu: Run):
    record, _ = on_gpu
    for folder in {folder_of(op) for op, device, _, name in record["chosen"] if name == "triton" and device == "cuda"}:
        assert kernels_of(folder) & set(record["launched"]), f"{folder}: none of its kernels in {record['launched']}"


@pytest.mark.gpu
def test_the_gap_is_reported_and_is_nothing_where_all_ops_are_ours(on_gpu: Run):
    record, folder = on_gpu
    gap = json.loads((folder / "summary.json").read_text())["max_abs_logprob_gap"]
    assert gap is not None and math.isfinite(gap)
    if not any(device == "cuda" and name in ("reference", "torch") for _, device, _, name in record["chosen"]):
        assert gap == 0.0


def test_the_same_holds_on_a_cpu_for_a_few_steps(tmp_path: Path):
    """The run above, smaller and on the CPU, so that every machine tests the checks."""
    small = ("--rl.steps=4", "--pretrain.steps=4", "--pretrain.tokens_per_step=256", "--rl.prompts_per_step=2", "--rl.group_size=4",
             "--eval.final_problems=4", "--eval.problems=4", "--eval.final_samples=1", "--sampling.max_tokens=12",
             "--rl.drop_no_signal=false", "--run.num_threads=1")
    record, folder = default_preset(tmp_path, "cpu", *small)
    check_run(record, folder, 4)
    assert record["launched"] == []


def test_a_reference_in_a_kernels_place_is_found():
    import_ops()
    if REGISTRY["linear"].resolve(torch.device("cpu"), torch.float32).name == "reference":
        pytest.skip("no native kernels here")
    assert plain_though_there_is_a_kernel([["linear", "cpu", "float32", "reference"]]) == [
        "linear on cpu in float32: reference, though there is native"]
    assert not plain_though_there_is_a_kernel([["linear", "cpu", "float64", "reference"], ["linear", "cpu", "float32", "native"]])
