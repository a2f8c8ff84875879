"""setup.py and CMakeLists.txt: a missing tool prints one line, bad sources fail, and both ways to build work."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import setuptools

from kernels.native import HASH_MARK, source_hash

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("setup.py", "pyproject.toml", "CMakeLists.txt", "MANIFEST.in", "README.md", "LICENSE", "csrc", "reason_rl/__init__.py",
           "kernels/__init__.py")


@pytest.fixture
def checkout(tmp_path: Path) -> Iterator[Path]:
    """A copy of the build's inputs, with nothing built. Only `linear` is compiled: all of csrc/ takes minutes."""
    for name in SOURCES:
        source, target = ROOT / name, tmp_path / "checkout" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copy(source, target)
    cmake_lists = tmp_path / "checkout/CMakeLists.txt"
    fewer = "set(SOURCES csrc/bindings.cpp csrc/common/gemm.cpp csrc/linear/cpu.cpp)"
    cmake_lists.write_text(re.sub(r"set\(SOURCES\n.*?\n\)", fewer, cmake_lists.read_text(), flags=re.DOTALL))
    yield tmp_path / "checkout"
    shutil.rmtree(tmp_path / "checkout")


@pytest.fixture
def setup_py(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    spec = importlib.util.spec_from_file_location("setup_py", ROOT / "setup.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    without = {name: value for name, value in os.environ.items() if name not in ("CXX", "CXXFLAGS", "CMAKE_ARGS", "MAKEFLAGS")}
    return subprocess.run(command, cwd=folder, env={**without, **environment}, capture_output=True, text=True)


def build_in_place(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return run(folder, sys.executable, "setup.py", "-q", "build_ext", "--inplace", **environment)


def configure(folder: Path, *options: str) -> str:
    """CMake's output for a build folder that is configured, not built."""
    done = run(folder, "cmake", "-B", "build", f"-DPython_EXECUTABLE={sys.executable}", "-DREASON_RL_ISA=portable", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def libraries(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("_native*.so")}


# --- missing tools


@pytest.mark.parametrize(("environment", "reason"), [
    ({"PATH": "/nonexistent"}, "no C++ compiler (looked for c++, g++, clang++); on Debian and Ubuntu, apt-get install g++"),
    ({"CXX": "/nonexistent/c++ -m64"}, "no C++ compiler: CXX=/nonexistent/c++ -m64 was not found; unset CXX or name another"),
])  # fmt: skip
def test_a_missing_compiler_is_one_line_and_no_failure(environment: dict[str, str], reason: str, checkout: Path):
    done = build_in_place(checkout, **environment)
    assert done.returncode == 0
    assert done.stderr == f"reason_rl: native kernels not built, so the reference ops are used: {reason}, then `make native`\n"
    assert not libraries(checkout / "kernels") and not (checkout / "build").exists()


def test_each_missing_tool_is_named_with_what_to_install(setup_py: ModuleType):
    def missing(*there: str, platform: str = "linux", **options: bool) -> str:
        return setup_py.missing_requirement(lambda name: name if name in there else None, platform=platform, **options)

    assert "no C++ compiler" in missing("cmake", "ninja")
    assert missing("g++", "ninja") == "no cmake; pip install cmake ninja"
    assert missing("clang++", "cmake") == "no ninja and no make; pip install ninja"
    assert "pip install --no-build-isolation" in missing("c++", "cmake", "make", has_torch=False)
    assert missing("c++", "cmake", "make") == missing("c++", "cmake", "ninja") == ""
    assert missing("c++", "cmake", "make", platform="darwin") == "csrc/ is built on Linux only, got darwin"


def test_another_cmake_command_resets_the_build_tree(setup_py: ModuleType, tmp_path: Path):
    tree = tmp_path / "tree"
    setup_py.reset_if_changed(tree, "cmake -G Ninja")
    (tree / "CMakeCache.txt").touch()
    setup_py.reset_if_changed(tree, "cmake -G Ninja")
    assert (tree / "CMakeCache.txt").exists()
    setup_py.reset_if_changed(tree, "cmake -G 'Unix Makefiles'")
    assert not (tree / "CMakeCache.txt").exists()


@pytest.mark.parametrize("name", ["CXX", "CXXFLAGS"])
def test_compiler_and_options_are_part_of_the_configuration(name: str, setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(name, raising=False)
    before = setup_py.configuration(["cmake"])
    monkeypatch.setenv(name, "clang++ -g")
    assert setup_py.configuration(["cmake"]) != before


def test_libraries_of_an_earlier_build_are_not_packed_into_a_wheel(checkout: Path):
    """Even if this build makes none."""
    (checkout / "out/kernels").mkdir(parents=True)
    (checkout / "out/kernels/_native_avx2.so").touch()
    done = run(checkout, sys.executable, "setup.py", "-q", "build", "--build-lib", "out", CXX="/nonexistent/c++")
    assert done.returncode == 0 and (checkout / "out/kernels/__init__.py").is_file() and not libraries(checkout / "out/kernels")


def test_an_sdist_holds_every_file_that_the_build_reads(checkout: Path):
    done = run(checkout, sys.executable, "setup.py", "-q", "sdist")
    assert done.returncode == 0, done.stderr
    [archive] = (checkout / "dist").iterdir()
    with tarfile.open(archive) as file:
        inside = {name.partition("/")[2] for name in file.getnames()}
    needed = {path.relative_to(checkout).as_posix() for path in (checkout / "csrc").rglob("*") if path.is_file()}
    assert needed and needed | {"setup.py", "CMakeLists.txt", "MANIFEST.in", "pyproject.toml"} <= inside


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_make_builds_again_when_a_library_or_a_source_is_deleted(checkout: Path):
    """With a fake Python that records each build."""
    for name in ("Makefile", "constraints.txt"):
        shutil.copy(ROOT / name, checkout / name)
    (checkout / ".venv/bin").mkdir(parents=True)
    (checkout / ".venv/bin/pip").touch()
    python = checkout / ".venv/bin/python"
    python.write_text('#!/bin/sh\ncase "$1" in setup.py) echo built >> builds; touch kernels/_native_portable.so;; esac\n')
    python.chmod(0o755)

    def num_builds() -> int:
        done = run(checkout, "make", ".venv/.native")
        assert done.returncode == 0, done.stdout + done.stderr
        return len((checkout / "builds").read_text().split())

    assert num_builds() == num_builds() == 1
    (checkout / "kernels/_native_portable.so").unlink()
    assert num_builds() == num_builds() == 2
    (checkout / "csrc/rope/rows.h").unlink()
    assert num_builds() == num_builds() == 3


def test_a_sanitizer_that_cannot_run_fails_only_if_the_kernels_are_required():
    assert run(ROOT, ".ci/sanitize", CXX="/nonexistent/c++", REASON_RL_REQUIRE_NATIVE="").returncode == 0
    done = run(ROOT, ".ci/sanitize", CXX="/nonexistent/c++", REASON_RL_REQUIRE_NATIVE="1")
    assert done.returncode == 1 and done.stdout == "make sanitize: skipped, no C++ compiler here\n"


# --- the build itself

needs_compiler = pytest.mark.skipif(not (shutil.which("c++") and shutil.which("cmake")), reason="needs c++ and cmake")


@needs_compiler
def test_sources_that_do_not_compile_fail_with_the_compilers_output(checkout: Path):
    (checkout / "csrc/bindings.cpp").write_text("#error planted here\n")
    done = build_in_place(checkout, CMAKE_ARGS="-DREASON_RL_ISA=portable -DREASON_RL_CUDA=OFF")
    assert done.returncode != 0 and "csrc/ does not compile" in done.stderr
    assert "planted here" in done.stdout + done.stderr


@needs_compiler
def test_an_unknown_instruction_set_is_refused(checkout: Path):
    done = build_in_place(checkout, CMAKE_ARGS="-DREASON_RL_ISA=sse9")
    assert done.returncode != 0 and "must be native, all or a list of" in done.stderr and "got sse9" in done.stderr


@needs_compiler
def test_libraries_of_other_builds_are_deleted(checkout: Path):
    for name in ("portable", "avx2", "cuda"):
        (checkout / f"kernels/_native_{name}.so").touch()
    configure(checkout, "-DREASON_RL_CUDA=OFF")
    assert libraries(checkout / "kernels") == {"_native_portable.so"}


@needs_compiler
def test_cmake_and_python_agree_on_the_hash_of_the_sources(checkout: Path):
    (checkout / "csrc/common/.#hidden.h").touch()
    (checkout / "csrc/common/notes.txt").touch()
    configure(checkout, "-DREASON_RL_CUDA=OFF")
    assert f'"{HASH_MARK.decode()}{source_hash(checkout / "csrc")}"' in (checkout / "build/source_hash.cpp").read_text()


@needs_compiler
@pytest.mark.parametrize(("refused", "message"), [
    ("compute_100", "native kernels for: CUDA 80;90, compiled by NVCC; not supported by this nvcc: 100"),
    ("compute_80", "native kernels for: CUDA 90;100, compiled by NVCC; not supported by this nvcc: 80"),
    ("nothing", "native kernels for: CUDA 80;90;100, compiled by NVCC"),
    ("c++20", "no native kernels for CUDA: NVCC fails: no c++20 here"),
])  # fmt: skip
def test_nvcc_builds_for_the_architectures_that_it_supports(refused: str, message: str, checkout: Path):
    nvcc = checkout / "nvcc"
    nvcc.write_text(f'#!/bin/sh\ncase "$*" in *{refused}*) echo "no {refused} here"; exit 1;; esac\n')
    nvcc.chmod(0o755)
    for _ in ("the first time", "from the cache"):
        output = configure(checkout, f"-DNVCC={nvcc}").replace(str(nvcc), "NVCC")
        assert f"-- {message}\n" in output


@pytest.mark.long
@needs_compiler
def test_a_plain_install_from_an_sdist_carries_the_libraries_in_the_package(checkout: Path, tmp_path: Path):
    """The checkout's kernels/ stays empty."""
    assert run(checkout, sys.executable, "setup.py", "-q", "sdist").returncode == 0
    [archive] = (checkout / "dist").iterdir()
    done = run(checkout, sys.executable, "-m", "pip", "wheel", str(archive), "--no-build-isolation", "--no-deps", "-q",
               "-w", str(tmp_path), CMAKE_ARGS="-DREASON_RL_ISA=portable -DREASON_RL_CUDA=OFF")
    assert done.returncode == 0, done.stderr
    [wheel] = tmp_path.glob("*.whl")
    assert "kernels/_native_portable.so" in zipfile.ZipFile(wheel).namelist() and "none-any" not in wheel.name
    assert not libraries(checkout / "kernels")


@pytest.mark.long
@needs_compiler
def test_cmake_by_itself_builds_into_kernels(checkout: Path):
    options = [f"-DPython_EXECUTABLE={sys.executable}", "-DREASON_RL_ISA=portable", "-DREASON_RL_CUDA=OFF"]
    build = ["cmake", "--build", "build", "-j", "2"]
    for command in (["cmake", "-B", "build", *options], build):
        done = run(checkout, *command)
        assert done.returncode == 0, done.stdout + done.stderr
    assert libraries(checkout / "kernels") == {"_native_portable.so"}
    first = source_hash(checkout / "csrc")
    assert (HASH_MARK + first.encode()) in (checkout / "kernels/_native_portable.so").read_bytes()
    with (checkout / "csrc/linear/cpu.cpp").open("a") as file:
        file.write("// edited\n")
    assert run(checkout, *build).returncode == 0
    source_hash.cache_clear()
    content = (checkout / "kernels/_native_portable.so").read_bytes()
    assert (HASH_MARK + source_hash(checkout / "csrc").encode()) in content and first.encode() not in content
