"""kernels/native.py: the library that it loads, the reason if it loads none, and that an explicit request works or raises."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import native
from kernels.native import HASH_MARK, SOURCES, STALE, source_hash

ROOT = Path(native.__file__).resolve().parent.parent
ZEN4 = frozenset(["fma", "avx2", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"])


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty folder that replaces the folder of the real libraries."""
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    return tmp_path


def build(folder: Path, *isas: str, of: str | None = None) -> None:
    """Fake libraries that hold only the hash of their sources, by default that of the present csrc/."""
    for isa in isas:
        (folder / f"_native_{isa}.so").write_bytes(b"not a library, " + HASH_MARK + (of or source_hash(SOURCES)).encode() + b"\0")


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


def test_without_a_library_the_reason_names_the_build_command(built: Path):
    assert native.pick_isa("", ZEN4) == ("", "not built here (`make native` builds it, or names what is missing)")


def test_a_request_is_fulfilled_or_raises(built: Path):
    build(built, "portable", "avx512")
    assert native.pick_isa("portable", ZEN4) == ("portable", "")
    with pytest.raises(ValueError, match=re.escape(f"REASON_RL_ISA=avx2, but {built}/_native_avx2.so was not built")):
        native.pick_isa("avx2", ZEN4)
    with pytest.raises(ValueError, match=r"REASON_RL_ISA=avx512, but this CPU runs only \['avx2', 'portable'\]"):
        native.pick_isa("avx512", frozenset(["avx2", "fma"]))
    with pytest.raises(ValueError, match=r"REASON_RL_ISA must be one of .*'portable'\], got 'sse9'"):
        native.pick_isa("sse9", ZEN4)


def test_a_library_that_was_built_from_other_sources_is_not_loaded(built: Path):
    build(built, "avx512_bf16", of="0" * 64)
    (built / "_native_avx512.so").touch()
    assert native.pick_isa("", ZEN4) == ("", "built from other sources (run `make native`)")
    with pytest.raises(ValueError, match=re.escape(f"{built}/_native_avx512_bf16.so was {STALE}")):
        native.pick_isa("avx512_bf16", ZEN4)
    build(built, "portable")
    assert native.pick_isa("", ZEN4) == ("portable", "")


def test_an_installed_package_trusts_any_library(built: Path, monkeypatch: pytest.MonkeyPatch):
    build(built, "avx2", of="0" * 64)
    monkeypatch.setattr(native, "SOURCES", built / "csrc")
    assert native.pick_isa("", ZEN4) == ("avx2", "")


def test_the_hash_follows_contents_and_names_of_what_is_compiled_and_nothing_else(tmp_path: Path):
    def hash_of(**files: str) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        for name, content in files.items():
            path = folder / "op" / name.replace("_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return source_hash(folder)

    first = hash_of(cpu_cpp="a", rows_h="b")
    assert hash_of(cpu_cpp="a", rows_h="b", notes_txt="c", _swap_h="d") == first
    others = [hash_of(cpu_cpp="A", rows_h="b"), hash_of(cpu_cpp="a", rows_h="B"), hash_of(cpu_cpp="a", lines_h="b"),
              hash_of(cpu_cpp="a"), hash_of(cpu_cpp="a", rows_h="b", cuda_cu="c")]
    assert len({first, *others}) == 6


def test_each_instruction_set_needs_the_flags_that_it_is_compiled_with():
    lists = dict(re.findall(r"^set\(NEEDS_(\w+) (.*)\)$", (ROOT / "CMakeLists.txt").read_text(), re.MULTILINE))
    words = {isa: needs.replace("${NEEDS_avx512}", lists["avx512"]).replace('""', "").split() for isa, needs in lists.items()}
    assert {isa: set(needs) for isa, needs in words.items()} == {isa: set(needs) for isa, needs in native.FLAGS.items()}


def test_the_cpus_flags_are_those_of_its_first_core_and_none_without_cpuinfo(tmp_path: Path):
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nflags\t\t: fpu avx2 fma\nbugs\t\t: none\n\nprocessor\t: 1\nflags\t\t: fpu\n")
    assert native.cpu_flags(info) == {"fpu", "avx2", "fma"}
    assert native.cpu_flags(tmp_path / "absent") == frozenset()


def ask(**environment: str) -> subprocess.CompletedProcess[str]:
    """Prints which native library a new process loads."""
    code = ("import torch; from kernels import native; from kernels.linear import OP; cpu = torch.device('cpu'); "
            "print(native.ISA or 'none', OP.resolve(cpu, torch.float32).name, native.cpu_unsupported_reason(cpu), sep='|')")
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)


def loaded(**environment: str) -> str:
    done = ask(**environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_another_folder_without_libraries_leaves_the_reference_and_a_reason(tmp_path: Path):
    assert loaded(REASON_RL_NATIVE_DIR=str(tmp_path), REASON_RL_ISA="").startswith("none|reference|not built here")


def test_a_library_that_does_not_load_leaves_the_reference_and_a_reason(tmp_path: Path):
    build(tmp_path, "portable")
    answer = loaded(REASON_RL_NATIVE_DIR=str(tmp_path), REASON_RL_ISA="")
    assert answer.startswith("none|reference|_native_portable.so does not load:") and "\n" not in answer


def test_a_requested_library_that_does_not_load_is_an_error(tmp_path: Path):
    build(tmp_path, "portable")
    done = ask(REASON_RL_NATIVE_DIR=str(tmp_path), REASON_RL_ISA="portable")
    assert done.returncode and "ValueError: REASON_RL_ISA=portable, but _native_portable.so does not load:" in done.stderr


def test_every_library_that_was_built_and_runs_here_loads_and_registers_the_same_ops():
    isas = [isa for isa, needed in native.FLAGS.items() if native.library(isa).is_file()
            and not native.is_stale(native.library(isa)) and native.cpu_flags().issuperset(needed)]
    if not isas:
        pytest.skip("no native library was built here")
    folder = str(native.FOLDER)
    assert {loaded(REASON_RL_ISA=isa, REASON_RL_NATIVE_DIR=folder) for isa in isas} == {f"{isa}|native|" for isa in isas}


def test_other_devices_are_refused():
    assert native.cpu_unsupported_reason(torch.device("cuda")) == "CPU only"
