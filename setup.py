"""The build: which packages there are, what travels with them, and the native kernels of csrc/.

`pip install -e . --no-build-isolation` (what `make` does) builds the kernels into kernels/, a plain install into the installed
package; CMakeLists.txt is the one list of sources, and CMAKE_ARGS is handed on to it. Where a tool is missing, one line says which,
and the install goes on: the reference ops work without. A compiler that is there and refuses our sources is a failure.
Name, version and requirements stand in pyproject.toml. `train.py`, `bench` and `tests` are run from the checkout and not installed.
"""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
COMPILERS = ("c++", "g++", "clang++")
READ_BY_CMAKE = ("CXX", "CXXFLAGS", "LDFLAGS", "CUDA_HOME")


def find(program: str) -> str | None:
    """Where a program is: beside this Python first, where pip puts cmake and ninja, then on the PATH."""
    return shutil.which(program, path=os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)]))


def what_is_missing(find: Callable[[str], str | None] = find, compiler: str = "", has_torch: bool = True,
                    platform: str = sys.platform) -> str:
    """The first thing that the build lacks, and how to get it; empty when nothing is missing. `compiler`: CXX."""
    if platform != "linux":
        return f"csrc/ is built on Linux only, and this is {platform}"
    if compiler and not find(shlex.split(compiler)[0]):
        return f"no C++ compiler: CXX={compiler} is not there; unset CXX or name another"
    if not compiler and not any(map(find, COMPILERS)):
        return f"no C++ compiler (looked for {', '.join(COMPILERS)}); on Debian and Ubuntu, apt-get install g++"
    if not find("cmake"):
        return "no cmake; pip install cmake ninja"
    if not find("ninja") and not find("make"):
        return "neither ninja nor make; pip install ninja"
    if not has_torch:
        return "no torch beside the build; pip install --no-build-isolation where torch is installed"
    return ""


def made_by(configure: list[str]) -> str:
    """What a build tree depends on and CMake reads in its first run only."""
    return "".join(f"{name}={os.environ.get(name, '').strip()}\n" for name in READ_BY_CMAKE) + shlex.join(configure) + "\n"


class BuildNative(build_ext):
    """CMake in place of setuptools' own compiler calls."""

    def run(self) -> None:
        output = (ROOT if self.inplace else Path(self.build_lib).resolve()) / "kernels"
        for earlier in [] if self.inplace else output.glob("_native_*.so"):
            earlier.unlink()  # else a wheel would carry them, whatever this build makes
        compiler = os.environ.get("CXX", "").strip()
        missing = what_is_missing(find, compiler, importlib.util.find_spec("torch") is not None)
        if missing:
            print("reason_rl: native kernels not built, the reference ops are used: "
                  f"{missing}{', then `make native`' if sys.platform == 'linux' else ''}", file=sys.stderr)
            return
        tree = ROOT / "build" / ("native" if self.inplace else "wheel")
        ninja = find("ninja")
        configure = [
            str(find("cmake")), "-S", str(ROOT), "-B", str(tree), "-G", "Ninja" if ninja else "Unix Makefiles",
            f"-DCMAKE_MAKE_PROGRAM={ninja or find('make')}", f"-DPython_EXECUTABLE={sys.executable}",
            f"-DREASON_RL_OUTPUT={output}", *shlex.split(os.environ.get("CMAKE_ARGS", ""))]
        forget_unless_made_by(tree, made_by(configure))
        done = subprocess.run(configure, capture_output=True, text=True)
        if done.returncode:
            raise CompileError(f"cmake does not configure:\n{done.stdout}{done.stderr}")
        print(*[line for line in done.stdout.splitlines() if "native kernels" in line], sep="\n", flush=True)
        build = [configure[0], "--build", str(tree), "--parallel", str(len(os.sched_getaffinity(0)))]
        if subprocess.run(build).returncode:
            raise CompileError("csrc/ does not compile: the compiler's words are above")

    def get_outputs(self) -> list[str]:
        return [] if self.inplace else [str(path) for path in Path(self.build_lib).glob("kernels/_native_*.so")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


def forget_unless_made_by(tree: Path, command: str) -> None:
    """CMake keeps generator, compiler and paths from its first run; another command starts afresh."""
    note = tree / "made_by.txt"
    if not note.is_file() or note.read_text() != command:
        shutil.rmtree(tree, ignore_errors=True)
        tree.mkdir(parents=True)
        note.write_text(command)


setup(
    packages=find_packages(include=["reason_rl", "reason_rl.*", "kernels", "kernels.*"]),
    package_data={"reason_rl": ["**/*.jinja", "**/*.css", "**/*.js", "data/prompts/*.toml"]},
    ext_modules=[Extension("kernels._native", sources=[])],
    cmdclass={"build_ext": BuildNative},
)
