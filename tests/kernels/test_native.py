"""kernels/native.py: which library is loaded, why none is, and that an explicit wish is met or refused."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import native

ROOT = Path(native.__file__).resolve().parent.parent
ZEN4 = frozenset(["fma", "avx2", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"])


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder to put libraries in, in place of the real one."""
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    return tmp_path


def build(folder: Path, *isas: str) -> None:
    for isa in isas:
        (folder / f"_native_{isa}.so").touch()


@pytest.mark.parametrize(("flags", "isas", "picked"), [
    (ZEN4, ["portable", "avx2", "avx512", "avx512_bf16"], "avx512_bf16"),
    (ZEN4 - {"avx512_bf16"}, ["portable", "avx2", "avx512", "avx512_bf16"], "avx512"),
    (ZEN4 - {"avx512vl"}, ["portable", "avx2", "avx512", "avx512_bf16"], "avx2"),
    (ZEN4 - {"fma"} - {"avx512f"}, ["portable", "avx2"], "portable"),
    (ZEN4, ["portable", "avx2"], "avx2"),
    (frozenset(), ["portable", "avx2", "avx512", "avx512_bf16"], "portable"),
    (frozenset(["avx2", "fma"]), ["avx512"], ""),
])  # fmt: skip
def test_the_best_that_was_built_and_that_the_cpu_runs_is_picked(flags: frozenset[str], isas: list[str], picked: str, built: Path):
    build(built, *isas)
    isa, why = native.pick_isa("", flags)
    assert isa == picked and bool(why) == (not picked)


def test_nothing_built_says_how_to_build(built: Path):
    assert native.pick_isa("", ZEN4) == ("", "not built here (`make native` builds it and says what is missing)")


def test_a_wish_is_met_or_refused(built: Path):
    build(built, "portable", "avx512")
    assert native.pick_isa("portable", ZEN4) == ("portable", "")
    with pytest.raises(ValueError, match=re.escape(f"REASON_RL_ISA=avx2, but {built}/_native_avx2.so was not built")):
        native.pick_isa("avx2", ZEN4)
    with pytest.raises(ValueError, match=r"REASON_RL_ISA=avx512, but this CPU runs only \['avx2', 'portable'\]"):
        native.pick_isa("avx512", frozenset(["avx2", "fma"]))
    with pytest.raises(ValueError, match=r"REASON_RL_ISA must be one of .*'portable'\], got 'sse9'"):
        native.pick_isa("sse9", ZEN4)


def test_the_cpus_flags_are_read_from_its_first_core_and_none_where_linux_does_not_tell(tmp_path: Path):
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nflags\t\t: fpu avx2 fma\nbugs\t\t: none\n\nprocessor\t: 1\nflags\t\t: fpu\n")
    assert native.cpu_flags(info) == {"fpu", "avx2", "fma"}
    assert native.cpu_flags(tmp_path / "absent") == frozenset()


def loaded(**environment: str) -> str:
    """What a new process says of its native ops."""
    code = ("import torch; from kernels import native; from kernels.linear import OP; cpu = torch.device('cpu'); "
            "print(native.ISA or 'none', OP.resolve(cpu, torch.float32).name, native.cpu_why_not(cpu), sep='|')")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_another_folder_without_libraries_leaves_the_reference_and_a_reason(tmp_path: Path):
    assert loaded(REASON_RL_NATIVE_DIR=str(tmp_path), REASON_RL_ISA="").startswith("none|reference|not built here")


def test_a_library_that_does_not_load_leaves_the_reference_and_says_so(tmp_path: Path):
    (tmp_path / "_native_portable.so").write_text("not a library")
    answer = loaded(REASON_RL_NATIVE_DIR=str(tmp_path), REASON_RL_ISA="")
    assert answer.startswith("none|reference|_native_portable.so does not load:") and "\n" not in answer


def test_every_library_that_was_built_and_runs_here_loads_and_registers_the_same_ops():
    isas = [isa for isa, needed in native.FLAGS.items() if native.library(isa).is_file() and native.cpu_flags().issuperset(needed)]
    if not isas:
        pytest.skip("no native library was built here")
    folder = str(native.FOLDER)
    assert {loaded(REASON_RL_ISA=isa, REASON_RL_NATIVE_DIR=folder) for isa in isas} == {f"{isa}|native|" for isa in isas}


def test_other_devices_are_refused():
    assert native.cpu_why_not(torch.device("cuda")) == "CPU only"
