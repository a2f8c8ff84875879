"""The sandbox in the parent process: which mechanisms hold on this machine, and the start and end of one
jail.

jail.py applies the mechanisms in the child. They are tested, not looked up: `held_mechanisms` starts a jail
with each. `require_sandbox` then runs a hostile program (trial.py) in a jail with all of them, and refuses if
any attempt succeeded.

Left out: control groups (they need a delegated subtree, which most machines lack); numpy and other packages
inside.
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
"""The whole environment: a candidate sees no secrets, and sets of strings have a fixed order."""
MECHANISMS = ("namespaces", "landlock", "seccomp")
REQUIRED = {"any": (("namespaces", "landlock"),), "namespaces": (("namespaces",),), "landlock": (("landlock",),),
            "all": (("namespaces",), ("landlock",), ("seccomp",))}
DYNAMIC_USERS = range(61184, 65520)  # reserved by systemd, so unused: if we are root, each jail runs as one of these
TRIAL_DEADLINE_S = 20.0
MAX_SCRATCH_FILES = 1000
JAIL_NUMBERS = itertools.count()
SCRATCH_PREFIX = "reason_rl_jail_"  # followed by the id of the process that made it


class SandboxError(ValueError):
    """Untrusted code does not run on this machine; the message names the missing mechanism."""


@dataclass(frozen=True)
class Limits:
    """The limits of one exam."""

    deadline_s: float = 12.0
    cpu_s: int = 4
    memory_bytes: int = 512 << 20
    file_bytes: int = 16 << 20
    """Of one file; with namespaces, of the whole scratch folder."""
    output_bytes: int = 64 << 10
    threads: int = 32


class Jail:
    """One interpreter that locks itself in. `status()` is "held", or the mechanism that failed and why."""

    def __init__(self, role: str, task: dict[str, Any], limits: Limits, use: tuple[str, ...], channel: socket.socket) -> None:
        """role: "candidate" or "examiner". use: the mechanisms. channel: the jail's end; closed here."""
        # The scratch folder, the pipes, and the task with the numbers of their descriptors.
        self.scratch, self._lock = ("", -1) if "namespaces" in use else make_scratch()
        self._is_ended, self.final_status = False, ""
        self.answer, answer = os.pipe()
        self._status, status = os.pipe()
        user = DYNAMIC_USERS[(os.getpid() * 64 + next(JAIL_NUMBERS)) % len(DYNAMIC_USERS)] if os.geteuid() == 0 else 0
        fds = (channel.fileno(), answer, status)
        spec = {"role": role, "use": use, "scratch": self.scratch, "user": user, "parent": os.getpid(), "channel": fds[0],
                "answer": answer, "status": status, **task, **asdict(limits)}

        # Start the interpreter without site packages, and send it the task.
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
        """Waits until the jail has locked itself in, or failed to."""
        text = b""
        while data := os.read(self._status, 4096):
            text += data
        return text.decode() or "start: the jail ended without a status"

    def end(self) -> int:
        """Kills all processes inside, waits, removes the scratch folder; returns the exit status % 256."""
        if self._is_ended:
            return int(self.process.returncode)
        self._is_ended = True

        # Kill the process tree.
        if self.process.poll() is None:
            self.process.terminate()  # the keeper kills the payload and waits for it
            try:
                self.process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                self.process.kill()  # the payload dies too, by its parent-death signal
                self.process.wait()

        # The status pipe is complete now; close and remove everything.
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
        """Does the scratch folder exceed its limit? Without namespaces the kernel does not bound it."""
        with contextlib.suppress(OSError), os.scandir(self.scratch) as entries:
            first = itertools.islice(entries, MAX_SCRATCH_FILES + 1)
            sizes = [entry.stat(follow_symlinks=False).st_blocks * 512 for entry in first]
            return len(sizes) > MAX_SCRATCH_FILES or sum(sizes) > limits.file_bytes
        return False


@functools.cache
def held_mechanisms() -> dict[str, str]:
    """For each mechanism, "" if a jail with it alone could be made, else the reason why not."""
    _remove_orphans()
    return {name: _why_not((name,)) for name in ("rlimits", *MECHANISMS)}


def make_scratch() -> tuple[str, int]:
    """(a folder, a descriptor with a lock on it). The kernel frees the lock when this process ends."""
    for _ in range(10):
        folder = tempfile.mkdtemp(prefix=f"{SCRATCH_PREFIX}{os.getpid()}_")
        if (lock := _lock(folder)) >= 0:
            return folder, lock
        shutil.rmtree(folder, ignore_errors=True)  # another process took it for an orphan, or descriptors ran out
    raise OSError(f"the scratch folder {folder} cannot be locked")


def remove_scratch(folder: str, lock: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)


def _lock(folder: str | Path) -> int:
    """A descriptor with the folder's lock; -1 if another process holds it, or the folder cannot be opened."""
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
    """Removes scratch folders whose owners were killed.

    Recognised by a free lock: process ids are ambiguous if several namespaces share the temporary folder.
    """
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
"""The result of the trial in this process, by the required set. A second one would end the same."""


def usable_mechanisms(sandbox: str = "any") -> tuple[str, ...]:
    """The mechanisms of every jail on this machine. Raises SandboxError if the required set does not hold, or
    if a trial program succeeds in anything."""
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
    """The mechanisms, if this process has tried them already and they suffice; else ()."""
    found = TRIED.get(sandbox, ())
    return found if isinstance(found, tuple) else ()


def _try_mechanisms(sandbox: str) -> tuple[str, ...]:
    if sandbox not in REQUIRED:
        raise SandboxError(f"the required set is one of {', '.join(REQUIRED)}, got {sandbox!r}")

    # Every required mechanism must hold alone.
    why_not = held_mechanisms()
    missing = [" or ".join(names) for names in (("rlimits",), *REQUIRED[sandbox]) if all(why_not[name] for name in names)]
    reasons = "; ".join(reason for reason in why_not.values() if reason)
    if missing:
        raise SandboxError(f"untrusted code is not run here: {sandbox!r} requires {' and '.join(missing)}, which this machine "
                           f"lacks ({reasons})")

    # All that hold together must withstand the trial. A root user with few capabilities stays root inside a
    # user namespace, and then the jail without namespaces is the better one: try that second.
    leaks = ""
    for left_out in ("", "namespaces"):
        use = tuple(name for name in MECHANISMS if not why_not[name] and name != left_out)
        if all(set(names) & set(use) for names in REQUIRED[sandbox]) and not (found := run_trial(use)):
            return use
        leaks = leaks or f"with rlimits, {', '.join(use)} a trial program succeeded in: {'; '.join(found)}"
    raise SandboxError(f"untrusted code is not run here: {leaks}" + (f" (absent: {reasons})" if reasons else ""))


def require_sandbox(sandbox: str = "any") -> str:
    """A line with the mechanisms that hold here, for a run to print. Raises SandboxError if too few do."""
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
    """The attempts of the trial program that succeeded in a jail of these mechanisms."""
    # A secret file and a listening port outside of the jail.
    limits = Limits(memory_bytes=256 << 20, file_bytes=1 << 20, threads=8)
    ours, theirs = socket.socketpair()
    task = {"source": (HERE / "trial.py").read_text()}
    with (_scratch() as outside, socket.create_server(("127.0.0.1", 0)) as server, ours,
          Jail("candidate", task, limits, use, theirs)):
        (Path(outside) / "secret").write_text("secret")
        for path, mode in ((outside, 0o777), (f"{outside}/secret", 0o666)):
            os.chmod(path, mode)  # so that nothing but the sandbox protects them

        # Run the program, with the places that it should try.
        ours.settimeout(TRIAL_DEADLINE_S)
        parent = 0 if "namespaces" in use else os.getpid()  # in a namespace the id would name another process
        port = server.getsockname()[1]
        try:
            return _ask_trial(ours, [outside, port, parent, limits.memory_bytes, limits.file_bytes, limits.threads])
        except (OSError, EOFError, ValueError) as error:
            return [f"the trial did not finish: {type(error).__name__}: {error}"]


def _ask_trial(channel: socket.socket, arguments: list[Any]) -> list[str]:
    deadline_s = time.monotonic() + TRIAL_DEADLINE_S
    answers = [wire.receive(channel)]
    for message in (["global", "trial"], ["call", {"remote": 0}, {"tuple": arguments}, {"dict": []}]):
        wire.send(channel, message)
        answers.append(wire.receive(channel))
        if time.monotonic() > deadline_s:
            raise ValueError(f"it took more than {TRIAL_DEADLINE_S:.0f} s")
    if any(answer[0] != "value" for answer in answers) or not isinstance(answers[-1][1], list):
        raise ValueError(f"expected three values, the last a list, got {answers}")
    return [str(leak) for leak in answers[-1][1]]
