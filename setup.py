"""Builds and installs the packages, with the native kernels of csrc/.

`pip install -e . --no-build-isolation` (what `make` runs) builds the kernels into kernels/; a plain install
builds them into the installed package. CMakeLists.txt lists the sources; CMAKE_ARGS is passed on to it. If a
tool is missing, one line names it and the install continues, because the reference ops work without the
kernels. Sources that the compiler rejects fail the install. Name, version and requirements are in
pyproject.toml. train.py, bench/ and tests/ run from the checkout and are not installed.
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
    """A program's path: in this Python's scripts folder, where pip installs cmake and ninja, or on the PATH."""
    return shutil.which(program, path=os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)]))


def missing_requirement(find: Callable[[str], str | None] = find, compiler: str = "", has_torch: bool = True,
                        platform: str = sys.platform) -> str:
    """The first missing requirement and the command that installs it, or "". `compiler` is the value of CXX."""
    if platform != "linux":
        return f"csrc/ is built on Linux only, got {platform}"
    if compiler and not find(shlex.split(compiler)[0]):
        return f"no C++ compiler: CXX={compiler} was not found; unset CXX or name another"
    if not compiler and not any(map(find, COMPILERS)):
        return f"no C++ compiler (looked for {', '.join(COMPILERS)}); on Debian and Ubuntu, apt-get install g++"
    if not find("cmake"):
        return "no cmake; pip install cmake ninja"
    if not find("ninja") and not find("make"):
        return "no ninja and no make; pip install ninja"
    if not has_torch:
        return "no torch in the build environment; install torch, then pip install --no-build-isolation"
    return ""


def configuration(command: list[str]) -> str:
    """The inputs that CMake reads only when it creates a build tree."""
    return "".join(f"{name}={os.environ.get(name, '').strip()}\n" for name in READ_BY_CMAKE) + shlex.join(command) + "\n"


class BuildNative(build_ext):
    """Runs CMake instead of setuptools' compiler calls."""

    def run(self) -> None:
        # Delete an earlier build's libraries, then stop if a tool is missing.
        output = (ROOT if self.inplace else Path(self.build_lib).resolve()) / "kernels"
        for earlier in [] if self.inplace else output.glob("_native_*.so"):
            earlier.unlink()  # or the wheel would contain them
        compiler = os.environ.get("CXX", "").strip()
        missing = missing_requirement(find, compiler, importlib.util.find_spec("torch") is not None)
        if missing:
            print("reason_rl: native kernels not built, so the reference ops are used: "
                  f"{missing}{', then `make native`' if sys.platform == 'linux' else ''}", file=sys.stderr)
            return
        # Configure, then build.
        tree = ROOT / "build" / ("native" if self.inplace else "wheel")
        ninja = find("ninja")
        configure = [
            str(find("cmake")), "-S", str(ROOT), "-B", str(tree), "-G", "Ninja" if ninja else "Unix Makefiles",
            f"-DCMAKE_MAKE_PROGRAM={ninja or find('make')}", f"-DPython_EXECUTABLE={sys.executable}",
            f"-DREASON_RL_OUTPUT={output}", *shlex.split(os.environ.get("CMAKE_ARGS", ""))]
        reset_if_changed(tree, configuration(configure))
        done = subprocess.run(configure, capture_output=True, text=True)
        if done.returncode:
            raise CompileError(f"cmake cannot configure csrc/:\n{done.stdout}{done.stderr}")
        print(*[line for line in done.stdout.splitlines() if "native kernels" in line], sep="\n", flush=True)
        build = [configure[0], "--build", str(tree), "--parallel", str(len(os.sched_getaffinity(0)))]
        if subprocess.run(build).returncode:
            raise CompileError("csrc/ does not compile, see the compiler's output above")

    def get_outputs(self) -> list[str]:
        return [] if self.inplace else [str(path) for path in Path(self.build_lib).glob("kernels/_native_*.so")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


def reset_if_changed(tree: Path, configuration: str) -> None:
    """Empties a build tree of another configuration, since CMake keeps generator, compiler and paths."""
    record = tree / "configuration.txt"
    if not record.is_file() or record.read_text() != configuration:
        shutil.rmtree(tree, ignore_errors=True)
        tree.mkdir(parents=True)
        record.write_text(configuration)


setup(
    packages=find_packages(include=["reason_rl", "reason_rl.*", "kernels", "kernels.*"]),
    package_data={"reason_rl": ["**/*.jinja", "**/*.css", "**/*.js", "data/prompts/*.toml"]},
    ext_modules=[Extension("kernels._native", sources=[])],
    cmdclass={"build_ext": BuildNative},
)
