"""`.ci/gpu` with a fake Python: the commands of its stages, and that a failed stage stops no other."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PATH = "/usr/bin:/bin"
PYTHON = """#!/bin/sh
echo "$@" >> "$CALLS"
case "$*" in
    *cuda.is_available*) exit "$NO_GPU" ;;
    *get_device_name*) echo Some_GPU ;;
    *find_spec*matplotlib*) exit 1 ;;
    *"$FAILS"*) echo "it broke"; exit 1 ;;
esac
"""


def run(folder: Path, *stages: str, fails: str = "nothing at all", no_gpu: str = "0") -> tuple[int, str, list[str]]:
    """-> (exit code, output, the arguments of each call of Python)"""
    python, calls = folder / "python", folder / "calls"
    python.write_text(PYTHON)
    python.chmod(0o755)
    environment = os.environ | {"PYTHON": str(python), "CALLS": str(calls), "FAILS": fails, "NO_GPU": no_gpu,
                                "OUT": str(folder / "out"), "CUDA_HOME": str(folder), "PATH": PATH}
    done = subprocess.run([ROOT / ".ci/gpu", *stages], env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr, calls.read_text().splitlines() if calls.is_file() else []


def modules(calls: list[str]) -> list[str]:
    return [call.removeprefix("-m ").split()[0] for call in calls if call.startswith("-m ")]


def test_all_stages_run_and_leave_their_logs(tmp_path: Path):
    if shutil.which("nvcc", path=PATH):
        pytest.skip("with nvcc the first stage builds, which a Python of paper cannot")
    code, said, calls = run(tmp_path)
    assert code == 0, said
    assert modules(calls) == ["kernels", "kernels", "pytest", "bench", *["bench.train_step", "bench.rollout"] * 2]
    assert any(f"--json {tmp_path}/out/Some_GPU.json" in call for call in calls)
    logs = {path.name for path in (tmp_path / "out").iterdir()}
    assert logs == {"build.log", "tests.log", "bench.log", "models.log", "summary.txt"} and "no nvcc: csrc/ is not built" in said


def test_a_stage_that_fails_is_reported_and_the_next_ones_run(tmp_path: Path):
    code, said, calls = run(tmp_path, "tests", "bench", fails="-m pytest")
    assert code == 1 and modules(calls)[-1] == "bench"
    summary = (tmp_path / "out/summary.txt").read_text()
    assert summary.startswith("tests FAILED in ") and "\nbench passed in " in summary and "it broke" in said


def test_a_failed_workload_stops_no_other(tmp_path: Path):
    code, _, calls = run(tmp_path, "models", fails="train_step --workload default")
    assert code == 1 and modules(calls) == ["bench.train_step", "bench.rollout"] * 2


@pytest.mark.parametrize(("stages", "no_gpu", "words"), [
    (["tests"], "1", "torch finds no CUDA device"), (["bench", "tets"], "0", "unknown stage tets; stages are build")])
def test_impossible_requests_are_refused_before_work(tmp_path: Path, stages: list[str], no_gpu: str, words: str):
    code, said, calls = run(tmp_path, *stages, no_gpu=no_gpu)
    assert code == 2 and words in said and not modules(calls)
