"""kernels/dispatch.py, checks.py and `python -m kernels`: the choice, the refusals, the printed table."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import __main__ as command
from kernels import dispatch
from kernels.checks import FLOATS, check, describe
from kernels.dispatch import Implementation, Op, table

CPU, CUDA, F32 = torch.device("cpu"), torch.device("cuda"), torch.float32
X = torch.tensor(3.0)


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps the ops of these tests out of the real registry."""
    monkeypatch.setattr(dispatch, "REGISTRY", {})


def needs_cuda(device: torch.device) -> str:
    return "" if device.type == "cuda" else "needs CUDA"


def make_op(name: str = "halve") -> Op:
    return Op(name, (
        Implementation("triton", lambda x: x * 0.5, needs_cuda), Implementation("reference", lambda x: x / 2)))


def test_auto_takes_the_first_that_can_run_on_the_device():
    op = make_op()
    assert op.choose(X).name == "reference" and op.resolve(CUDA, F32).name == "triton"
    assert op.choose(X).run(X) == 1.5


def test_auto_skips_what_lacks_the_dtype_or_runs_on_request_only():
    op = Op("picky", (
        Implementation("native", lambda x: x, dtypes=(F32,)), Implementation("torch", lambda x: x, is_automatic=False),
        Implementation("reference", lambda x: x)))
    assert op.choose(X).name == "native" and op.choose(X.double()).name == "reference"
    assert op.choose(X.double(), "torch").name == "torch"
    with pytest.raises(ValueError, match="picky: impl='native' cannot run on cpu: not for f64"):
        op.choose(X.double(), "native")


def test_an_explicit_choice_works_or_fails_loudly_with_the_reason():
    op = make_op()
    assert op.resolve(CUDA, F32, "reference").name == "reference"
    with pytest.raises(ValueError, match="halve: impl='triton' cannot run on cpu: needs CUDA"):
        op.choose(X, "triton")
    with pytest.raises(ValueError, match=r"halve: impl must be one of \['auto', 'triton', 'reference'\], got 'native'"):
        op.choose(X, "native")


def test_an_implementation_declines_a_variant_that_it_does_not_implement(caplog: pytest.LogCaptureFixture):
    dispatch.warn_once.cache_clear()
    op = Op("loss", (
        Implementation("triton", lambda x: x, needs_cuda, variants=("clip",)),
        Implementation("native", lambda x: x, variants=("clip",)), Implementation("reference", lambda x: x)))
    assert op.choose(X).name == op.choose(X, variant="clip").name == "native" and not caplog.messages
    assert op.choose(X, variant="mine").name == op.choose(X.double(), variant="mine").name == "reference"
    assert caplog.messages == ["loss: no kernel implements 'mine'; the reference runs instead"]
    with pytest.raises(ValueError, match="loss: impl='native' cannot run on cpu: does not implement 'mine'"):
        op.choose(X, "native", "mine")


def test_a_variant_prints_nothing_if_the_reference_runs_anyway(caplog: pytest.LogCaptureFixture):
    op = Op("loss", (
        Implementation("triton", lambda x: x, needs_cuda, variants=("clip",)), Implementation("reference", lambda x: x)))
    assert op.choose(X, variant="mine").name == "reference" and not caplog.messages


def test_no_usable_implementation_is_a_clear_error_and_a_line_in_the_table():
    op = Op("gpu_only", (Implementation("triton", lambda x: x, needs_cuda),))
    with pytest.raises(ValueError, match=r"gpu_only: nothing runs on cpu \(triton: needs CUDA\)"):
        op.choose(X)
    assert table(CPU) == [("gpu_only", "", "none", "triton: needs CUDA")]


def test_the_choice_is_made_once_per_device_and_dtype():
    asked = []
    op = Op("counted", (Implementation("reference", lambda x: x, lambda device: asked.append(device) or ""),))
    assert op.choose(X) is op.choose(X)
    op.choose(X.double())
    assert asked == [CPU, CPU]


def test_the_table_is_sorted_and_says_why():
    make_op("b_op")
    Op("a_op", (Implementation("native", lambda x: x), Implementation("reference", lambda x: x)))
    Op("c_op", (Implementation("reference", lambda x: x),))
    assert table(CPU) == [
        ("a_op", "native, reference", "native", "native comes first"),
        ("b_op", "reference", "reference", "triton: needs CUDA"),
        ("c_op", "reference", "reference", "reference is the only one"),
    ]


def test_the_table_gives_reasons_for_those_before_the_picked_one_only():
    Op("sample", (
        Implementation("asked", lambda x: x, is_automatic=False), Implementation("cuda", lambda x: x, needs_cuda),
        Implementation("native", lambda x: x), Implementation("triton", lambda x: x, needs_cuda)))
    Op("first", (Implementation("native", lambda x: x), Implementation("triton", lambda x: x, needs_cuda)))
    assert table(CPU) == [
        ("first", "native", "native", "native is the only one"),
        ("sample", "asked, native", "native", "asked: by name only; cuda: needs CUDA"),
    ]


def test_the_table_is_for_the_dtype_asked_but_some_ops_are_given_float32():
    for name in ("linear", "grpo_loss"):
        Op(name, (Implementation("native", lambda x: x, dtypes=(F32,)), Implementation("reference", lambda x: x)))
    assert [(row[0], row[2]) for row in table(CPU, torch.bfloat16)] == [("grpo_loss", "native"), ("linear", "reference")]


def test_every_op_that_is_given_float32_is_one():
    names = {path.parent.name for path in Path(dispatch.__file__).parent.glob("*/__init__.py")} | {"moe_route"}
    assert set(dispatch.FLOAT32_OPS) <= names


def test_an_implementation_cannot_be_changed_after_the_fact():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_op().implementations[0].name = "other"  # type: ignore[misc]


# --- checks


def test_a_tensor_that_fits_passes():
    check("op", "x", torch.zeros(2, 3), (2, "D"), torch.float32)
    check("op", "x", torch.zeros(2, 0), ("T", "D"), FLOATS, like=torch.zeros(1))
    check("op", "x", torch.tensor(1.0), (), FLOATS)


@pytest.mark.parametrize(("tensor", "words"), [
    (torch.zeros(9, dtype=torch.int64), r"must be i32\[S\+1\], got i64\[9\] on cpu"),
    (torch.zeros(9, 1, dtype=torch.int32), r"must be i32\[S\+1\], got i32\[9, 1\] on cpu"),
    (torch.tensor(0, dtype=torch.int32), r"must be i32\[S\+1\], got i32\[\] on cpu"),
    ([1, 2], r"must be i32\[S\+1\], got list"),
    (None, r"must be i32\[S\+1\], got NoneType"),
])  # fmt: skip
def test_the_error_names_op_argument_expected_and_actual(tensor: object, words: str):
    with pytest.raises(ValueError, match="^attention: cu_seqlens " + words):
        check("attention", "cu_seqlens", tensor, ("S+1",), torch.int32)  # type: ignore[arg-type]


def test_fixed_sizes_are_held():
    with pytest.raises(ValueError, match=re.escape("op: x must be f32|bf16[T, 4], got f32[2, 3] on cpu")):
        check("op", "x", torch.zeros(2, 3), ("T", 4), (torch.float32, torch.bfloat16))


def test_another_device_is_refused():
    with pytest.raises(ValueError, match=r"op: x must be f32\[2\] on cpu, got f32\[2\] on meta"):
        check("op", "x", torch.zeros(2, device="meta"), (2,), torch.float32, like=torch.zeros(1))


def test_a_dtype_without_a_short_name_is_described_all_the_same():
    assert describe(torch.zeros(2, dtype=torch.complex64)) == "torch.complex64[2] on cpu"


# --- python -m kernels


def test_columns_line_up():
    assert command.render([("op", "why"), ("a_long_op", "x"), ("b", "")]) == "op         why\na_long_op  x\nb"


def test_the_command_lists_every_op_package_with_torch_alone():
    code = ("import sys, runpy; sys.argv = ['kernels']; runpy.run_module('kernels', run_name='__main__'); "
            "print('LOADED', sorted({'rich', 'reason_rl', 'tokenizers', 'safetensors'} & set(sys.modules)))")
    root = Path(command.__file__).resolve().parent.parent
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    *lines, loaded = result.stdout.splitlines()
    assert loaded == "LOADED []"
    listed = " ".join(line.split()[0] for line in lines[2:])
    packages = [p.parent.name for p in sorted((root / "kernels").glob("*/__init__.py"))]
    assert packages and all(name in listed for name in packages), f"{packages} against {listed}"


def test_an_invalid_device_is_refused_by_name(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        command.main(["--device", "abacus"])
    assert "got 'abacus'" in capsys.readouterr().err
