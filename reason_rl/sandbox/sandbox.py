"""The sandbox, seen from outside: which of its mechanisms hold on this machine, and one jail's start and end.

jail.py applies them in the child. Here they are tried, not looked up: `held_mechanisms` starts a jail with each, and
`require_sandbox` then lets a hostile program (trial.py) loose in a jail with all of them and refuses when anything got through.

Left out: control groups (they need a delegated subtree, which most machines do not give); numpy and other packages inside.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from reason_rl.sandbox import syscalls, wire

HERE = Path(__file__).resolve().parent
ENTRY = ("import sys, types; package = sys.modules['jailed'] = types.ModuleType('jailed'); package.__path__ = [sys.argv[1]]; "
         "from jailed.jail import main; main()")
ENVIRONMENT = {"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8", "TZ": "UTC", "HOME": "/scratch", "TMPDIR": "/scratch"}
"""All of it: a candidate sees no token, and sets of strings have one order."""
MECHANISMS = ("namespaces", "landlock", "seccomp")
REQUIRED = {"any": (("namespaces", "landlock"),), "namespaces": (("namespaces",),), "landlock": (("landlock",),),
            "all": (("namespaces",), ("landlock",), ("seccomp",))}
DYNAMIC_USERS = range(61184, 65520)  # systemd's, so nobody's: where we are root, each jail takes one of these
TRIAL_DEADLINE_S = 20.0
MAX_SCRATCH_FILES = 1000
JAIL_NUMBERS = itertools.count()
SCRATCH_PREFIX = "reason_rl_jail_"  # then the process that made it


class SandboxError(ValueError):
    """Untrusted code is not run here; the message names what does not hold."""


@dataclass(frozen=True)
class Limits:
    """Of one grading; reward.code_* in the config."""

    deadline_s: float = 12.0
    cpu_s: int = 4
    memory_bytes: int = 512 << 20
    file_bytes: int = 16 << 20
    """One file, and where namespaces hold the whole scratch folder."""
    output_bytes: int = 64 << 10
    threads: int = 32


class Jail:
    """One interpreter that shuts itself in. `status` is "held" once it has, or the mechanism that failed and why."""

    def __init__(self, role: str, task: dict[str, Any], limits: Limits, use: tuple[str, ...], channel: socket.socket) -> None:
        self.scratch, self._lock = ("", -1) if "namespaces" in use else make_scratch()
        self._is_ended, self.final_status = False, ""
        self.answer, answer = os.pipe()
        self._status, status = os.pipe()
        user = DYNAMIC_USERS[(os.getpid() * 64 + next(JAIL_NUMBERS)) % len(DYNAMIC_USERS)] if os.geteuid() == 0 else 0
        fds = (channel.fileno(), answer, status)
        spec = {"role": role, "use": use, "scratch": self.scratch, "user": user, "parent": os.getpid(), "channel": fds[0],
                "answer": answer, "status": status, **task, **asdict(limits)}
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-S", "-s", "-P", "-c", ENTRY, str(HERE)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, pass_fds=fds, env=ENVIRONMENT, cwd="/", start_new_session=True)
        except OSError:
            self._close()
            raise
        finally:
            os.close(answer)
            os.close(status)
            channel.close()
        assert self.process.stdin is not None and self.process.stdout is not None
        self.output = self.process.stdout.fileno()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(spec).encode())
            self.process.stdin.close()

    def __enter__(self) -> Jail:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def status(self) -> str:
        """Waits until the jail has shut itself in or has failed to."""
        text = b""
        while part := os.read(self._status, 4096):
            text += part
        return text.decode() or "start: no word from the jail"

    def end(self) -> int:
        """Kill all that is left inside, wait for it, remove the scratch folder; the payload's exit status modulo 256."""
        if self._is_ended:
            return int(self.process.returncode)
        self._is_ended = True
        if self.process.poll() is None:
            self.process.terminate()  # the keeper kills the payload and waits for it
            try:
                self.process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                self.process.kill()  # and the payload with it, by its parent-death signal
                self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.final_status = self.status()
        self._close()
        return int(self.process.returncode)

    def _close(self) -> None:
        os.close(self.answer)
        os.close(self._status)
        if self.scratch:
            remove_scratch(self.scratch, self._lock)

    def overflows(self, limits: Limits) -> bool:
        """Has it written more to its scratch folder than is allowed? In namespaces that folder is in memory, and bounded."""
        with contextlib.suppress(OSError), os.scandir(self.scratch) as entries:
            first = itertools.islice(entries, MAX_SCRATCH_FILES + 1)
            sizes = [entry.stat(follow_symlinks=False).st_blocks * 512 for entry in first]
            return len(sizes) > MAX_SCRATCH_FILES or sum(sizes) > limits.file_bytes
        return False


@functools.cache
def held_mechanisms() -> dict[str, str]:
    """For each mechanism "" when a jail with it alone could be made, else the reason why not."""
    _remove_orphans()
    return {name: _why_not((name,)) for name in ("rlimits", *MECHANISMS)}


def make_scratch() -> tuple[str, int]:
    """A folder and a descriptor that holds the lock on it: free again when this process ends, however that comes about."""
    for _ in range(10):
        folder = tempfile.mkdtemp(prefix=f"{SCRATCH_PREFIX}{os.getpid()}_")
        if (lock := _lock(folder)) >= 0:
            return folder, lock
        shutil.rmtree(folder, ignore_errors=True)  # taken for an orphan between the two; or no descriptor is to be had
    raise OSError(f"the scratch folder {folder} cannot be locked")


def remove_scratch(folder: str, lock: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)


def _lock(folder: str | Path) -> int:
    """-1 where another holds it, it is gone, or it is not ours to open."""
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return -1
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.exists(folder):
            return lock
    except OSError:
        pass
    os.close(lock)
    return -1


def _remove_orphans() -> None:
    """Of owners that were killed. By their locks: a process's number says nothing where another namespace shares the folder."""
    for folder in Path(tempfile.gettempdir()).glob(f"{SCRATCH_PREFIX}*_*"):
        if (lock := _lock(folder)) >= 0:
            remove_scratch(str(folder), lock)


def _why_not(use: tuple[str, ...]) -> str:
    ours, theirs = socket.socketpair()
    with ours, Jail("candidate", {"source": ""}, Limits(), tuple(name for name in use if name in MECHANISMS), theirs) as jail:
        watch = threading.Timer(TRIAL_DEADLINE_S, jail.process.kill)
        watch.start()
        status = jail.status()
        watch.cancel()
        return "" if status == "held" else status


TRIED: dict[str, tuple[str, ...] | SandboxError] = {}
"""By the configured set: what came of the trial in this process. A second would take as long and end alike."""


def usable_mechanisms(sandbox: str = "any") -> tuple[str, ...]:
    """What every jail here is made of; raises SandboxError where the configured set does not hold, or a trial gets through it."""
    if sandbox not in TRIED:
        try:
            TRIED[sandbox] = _try_mechanisms(sandbox)
        except SandboxError as error:
            TRIED[sandbox] = error
    found = TRIED[sandbox]
    if isinstance(found, SandboxError):
        raise SandboxError(str(found))
    return found


def known_mechanisms(sandbox: str) -> tuple[str, ...]:
    """As far as this process has tried them; () where it has not, or they are not enough."""
    found = TRIED.get(sandbox, ())
    return found if isinstance(found, tuple) else ()


def _try_mechanisms(sandbox: str) -> tuple[str, ...]:
    if sandbox not in REQUIRED:
        raise SandboxError(f"reward.code_sandbox is one of {', '.join(REQUIRED)}, got {sandbox!r}")
    why_not = held_mechanisms()
    missing = [" or ".join(names) for names in (("rlimits",), *REQUIRED[sandbox]) if all(why_not[name] for name in names)]
    reasons = "; ".join(reason for reason in why_not.values() if reason)
    if missing:
        raise SandboxError(f"untrusted code is not run here: reward.code_sandbox = {sandbox!r} requires {' and '.join(missing)}, "
                           f"which this machine does not give ({reasons})")
    leaks = ""
    for left_out in ("", "namespaces"):  # a root of few rights has a better jail without a user namespace, in which it stays root
        use = tuple(name for name in MECHANISMS if not why_not[name] and name != left_out)
        if all(set(names) & set(use) for names in REQUIRED[sandbox]) and not (found := run_trial(use)):
            return use
        leaks = leaks or f"with rlimits, {', '.join(use)} a trial program got through: {'; '.join(found)}"
    raise SandboxError(f"untrusted code is not run here: {leaks}" + (f" (absent: {reasons})" if reasons else ""))


def require_sandbox(sandbox: str = "any") -> str:
    """The line to print at the start: which mechanisms hold here. Raises SandboxError, a ValueError, when that is not enough."""
    use = usable_mechanisms(sandbox)
    words = {"namespaces": "namespaces", "landlock": "Landlock", "seccomp": "seccomp"}
    if "landlock" in use:
        words["landlock"] += f" (ABI {syscalls.landlock_abi()})"
    why_not = held_mechanisms()
    absent = "; ".join(why_not[name] or f"{name}: not needed" for name in MECHANISMS if name not in use)
    return f"code sandbox: rlimits, {', '.join(words[name] for name in use)} hold" + (f"; absent: {absent}" if absent else "")


@contextlib.contextmanager
def _scratch() -> Iterator[str]:
    folder, lock = make_scratch()
    try:
        yield folder
    finally:
        remove_scratch(folder, lock)


def run_trial(use: tuple[str, ...]) -> list[str]:
    """What a program that tries everything could do from inside a jail of these mechanisms; empty is as it must be."""
    limits = Limits(memory_bytes=256 << 20, file_bytes=1 << 20, threads=8)
    ours, theirs = socket.socketpair()
    task = {"source": (HERE / "trial.py").read_text()}
    with (_scratch() as outside, socket.create_server(("127.0.0.1", 0)) as server, ours,
          Jail("candidate", task, limits, use, theirs)):
        (Path(outside) / "secret").write_text("secret")
        for path, mode in ((outside, 0o777), (f"{outside}/secret", 0o666)):
            os.chmod(path, mode)  # so that only the sandbox stands in the way
        ours.settimeout(TRIAL_DEADLINE_S)
        parent = 0 if "namespaces" in use else os.getpid()  # in a namespace the number means another process
        port = server.getsockname()[1]
        try:
            return _ask_trial(ours, [outside, port, parent, limits.memory_bytes, limits.file_bytes, limits.threads])
        except (OSError, EOFError, ValueError) as error:
            return [f"the trial could not be held: {type(error).__name__}: {error}"]


def _ask_trial(channel: socket.socket, arguments: list[Any]) -> list[str]:
    deadline_s = time.monotonic() + TRIAL_DEADLINE_S
    answers = [wire.receive(channel)]
    for message in (["global", "trial"], ["call", {"remote": 0}, {"tuple": arguments}, {"dict": []}]):
        wire.send(channel, message)
        answers.append(wire.receive(channel))
        if time.monotonic() > deadline_s:
            raise ValueError("it took too long")
    if any(answer[0] != "value" for answer in answers) or not isinstance(answers[-1][1], list):
        raise ValueError(f"answers {answers}")
    return [str(leak) for leak in answers[-1][1]]
