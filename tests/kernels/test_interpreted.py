"""The Triton kernels without a GPU: each op's tests again, and a whole step, in a process with Triton's interpreter.

This tests the f32 arithmetic and the indexing. It cannot test bf16 rounding, races or speed (tests marked `gpu`).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.ahead_of_time import ops_with_triton
from kernels.triton_ops import IS_INTERPRETED

CHECKOUT = Path(__file__).resolve().parents[2]


pytestmark = pytest.mark.skipif(IS_INTERPRETED, reason="this is the process that interprets")


def assert_passes_interpreted(*files: str) -> None:
    pytest.importorskip("triton")
    found = [file for file in files if (CHECKOUT / file).exists()]
    assert found, f"none of {files} exists: without a file, pytest would run all tests"
    command = [sys.executable, "-m", "pytest", *found, "-p", "no:cacheprovider", "-n", "0", "-m", "not gpu and not long"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=CHECKOUT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    assert " passed" in done.stdout, f"nothing ran:\n{done.stdout[-2000:]}"


@pytest.mark.parametrize("op", ops_with_triton())
def test_an_op_passes_its_tests_in_tritons_interpreter(op: str):
    assert_passes_interpreted(f"tests/kernels/test_{op}.py", f"tests/kernels/test_{op}_triton.py")


def test_an_update_and_a_rollout_run_in_tritons_interpreter():
    assert_passes_interpreted("tests/reason_rl/trainer/test_triton_update.py")
