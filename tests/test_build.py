"""setup.py and CMakeLists.txt: a missing tool is one clear line, sources that do not compile fail, and both ways to build work."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import setuptools

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE", "csrc", "reason_rl/__init__.py",
           "kernels/__init__.py")


@pytest.fixture
def checkout(tmp_path: Path) -> Iterator[Path]:
    """A copy of what the build needs, with nothing built, and of csrc/ only `linear`: the rest takes its minutes."""
    for name in SOURCES:
        source, target = ROOT / name, tmp_path / "checkout" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copy(source, target)
    lists = tmp_path / "checkout/CMakeLists.txt"
    some = "set(SOURCES csrc/bindings.cpp csrc/common/gemm.cpp csrc/linear/cpu.cpp)"
    lists.write_text(re.sub(r"set\(SOURCES\n.*?\n\)", some, lists.read_text(), flags=re.DOTALL))
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
    without = {name: value for name, value in os.environ.items() if name not in ("CXX", "CMAKE_ARGS")}
    return subprocess.run(command, cwd=folder, env={**without, **environment}, capture_output=True, text=True)


def build_in_place(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return run(folder, sys.executable, "setup.py", "-q", "build_ext", "--inplace", **environment)


def libraries(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("_native*.so")}


# --- what is missing


@pytest.mark.parametrize(("environment", "word"), [
    ({"PATH": "/nonexistent"}, "no C++ compiler (looked for c++, g++, clang++); on Debian and Ubuntu, apt-get install g++"),
    ({"CXX": "/nonexistent/c++ -m64"}, "no C++ compiler: CXX=/nonexistent/c++ -m64 is not there; unset CXX or name another"),
])  # fmt: skip
def test_a_missing_compiler_is_one_line_and_no_failure(environment: dict[str, str], word: str, checkout: Path):
    done = build_in_place(checkout, **environment)
    assert done.returncode == 0
    assert done.stderr == f"reason_rl: native kernels not built, the reference ops are used: {word}, then `make native`\n"
    assert not libraries(checkout / "kernels") and not (checkout / "build").exists()


def test_each_missing_tool_is_named_with_what_to_install(setup_py: ModuleType):
    def missing(*there: str, **options: bool) -> str:
        return setup_py.what_is_missing(lambda name: name if name in there else None, **options)

    assert "no C++ compiler" in missing("cmake", "ninja")
    assert missing("g++", "ninja") == "no cmake; pip install cmake ninja"
    assert missing("clang++", "cmake") == "neither ninja nor make; pip install ninja"
    assert "pip install --no-build-isolation" in missing("c++", "cmake", "make", has_torch=False)
    assert missing("c++", "cmake", "make") == missing("c++", "cmake", "ninja") == ""


def test_another_way_of_building_starts_afresh(setup_py: ModuleType, tmp_path: Path):
    tree = tmp_path / "tree"
    setup_py.forget_unless_made_by(tree, "cmake -G Ninja")
    (tree / "CMakeCache.txt").touch()
    setup_py.forget_unless_made_by(tree, "cmake -G Ninja")
    assert (tree / "CMakeCache.txt").exists()
    setup_py.forget_unless_made_by(tree, "cmake -G 'Unix Makefiles'")
    assert not (tree / "CMakeCache.txt").exists()


# --- the build itself

needs_compiler = pytest.mark.skipif(not (shutil.which("c++") and shutil.which("cmake")), reason="needs c++ and cmake")


@needs_compiler
def test_sources_that_do_not_compile_are_a_failure_that_shows_the_compilers_words(checkout: Path):
    (checkout / "csrc/bindings.cpp").write_text("#error planted here\n")
    done = build_in_place(checkout, CMAKE_ARGS="-DREASON_RL_ISA=portable -DREASON_RL_CUDA=OFF")
    assert done.returncode != 0 and "csrc/ does not compile" in done.stderr
    assert "planted here" in done.stdout + done.stderr


@needs_compiler
def test_an_unknown_instruction_set_is_refused(checkout: Path):
    done = build_in_place(checkout, CMAKE_ARGS="-DREASON_RL_ISA=sse9")
    assert done.returncode != 0 and "must be native, all or a list of" in done.stderr and "got sse9" in done.stderr


@pytest.mark.long
@needs_compiler
def test_a_plain_install_carries_the_libraries_in_the_package(checkout: Path, tmp_path: Path):
    """And the checkout's own kernels/ stays empty."""
    done = run(checkout, sys.executable, "-m", "pip", "wheel", ".", "--no-build-isolation", "--no-deps", "-q", "-w", str(tmp_path),
               CMAKE_ARGS="-DREASON_RL_ISA=portable -DREASON_RL_CUDA=OFF")
    assert done.returncode == 0, done.stderr
    [wheel] = tmp_path.glob("*.whl")
    assert "kernels/_native_portable.so" in zipfile.ZipFile(wheel).namelist() and "none-any" not in wheel.name
    assert not libraries(checkout / "kernels")


@pytest.mark.long
@needs_compiler
def test_cmake_by_itself_builds_into_kernels(checkout: Path):
    options = [f"-DPython_EXECUTABLE={sys.executable}", "-DREASON_RL_ISA=portable", "-DREASON_RL_CUDA=OFF"]
    for command in (["cmake", "-B", "build", *options], ["cmake", "--build", "build", "-j", "2"]):
        done = run(checkout, *command)
        assert done.returncode == 0, done.stdout + done.stderr
    assert libraries(checkout / "kernels") == {"_native_portable.so"}
