"""Targets for attacks, so that harm is detected: a file that everyone may write, a listening port, the tests' process.

`World.harm` compares them with their first state. Processes that an attack leaves behind become children of this
one, which makes itself their reaper, so that all are found.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import resource
import shutil
import signal
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

from reason_rl.sandbox import jail

ROOT = Path(__file__).resolve().parents[4]
PR_SET_CHILD_SUBREAPER = 36
MARKED = [Path(folder) for folder in ("/tmp", "/var/tmp", "/dev/shm", "/dev/mqueue", "/root", Path.home(), Path.cwd())]
GRACE_S = 5.0
"""For the kernel to end what belonged to a process that is gone."""


class World:
    def __init__(self) -> None:
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self.folder = Path(tempfile.mkdtemp(prefix="reason_rl_victims_"))
        self.victim = self.folder / "victim"
        self.victim.write_text("intact")
        self.folder.chmod(0o777)
        self.victim.chmod(0o666)
        self.listeners = [socket.create_server(("127.0.0.1", 0))]
        self.port = self.listeners[0].getsockname()[1]
        self.listeners.append(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        self.listeners[1].bind(("127.0.0.1", self.port))
        for listener in self.listeners:
            listener.setblocking(False)
        self.children, self.before = children(), self.look()

    def places(self) -> dict[str, object]:
        """For `tables.load`."""
        return {"victim": self.victim, "victims": self.folder, "parent": os.getpid(), "port": self.port, "repo": ROOT}

    def look(self) -> dict[str, Any]:
        """Everything that must be the same afterwards."""
        ours = [*Path(jail.__file__).parent.glob("*.py"), *Path(__file__).parent.glob("*.*"), Path(os.__file__)]
        marked = [str(path) for folder in MARKED for path in (folder.glob("*reason_rl_attack*") if folder.is_dir() else [])]
        return {
            "files outside": {str(path): traces(path) for path in [self.folder, *self.folder.glob("*"), *ours] if path.exists()},
            "content": self.victim.read_text() if self.victim.exists() else None,
            "new files": sorted(marked),
            "scratch folders": list(Path(tempfile.gettempdir()).glob(f"reason_rl_jail_{os.getpid()}_*")),
            "shared memory": re.findall(rf"^ *{0x5EED} .*$", Path("/proc/sysvipc/shm").read_text(), re.MULTILINE),
            "limits": resource.getrlimit(resource.RLIMIT_NOFILE),
            "priority": (os.getpriority(os.PRIO_PROCESS, 0), os.sched_getaffinity(0), os.sched_getscheduler(0)),
        }

    def harm(self) -> list[str]:
        """Lists everything that changed; waits a little for processes that are ending."""
        now = self.look()
        found = [f"{name}: was {was}, is {now[name]}" for name, was in self.before.items() if was != now[name]]
        for kind, listener in zip(("TCP", "UDP"), self.listeners):
            with contextlib.suppress(BlockingIOError):
                found.append(f"{kind}: {listener.accept() if kind == 'TCP' else listener.recvfrom(100)}")
        until_s = time.monotonic() + GRACE_S
        while (left := children() - self.children) and time.monotonic() < until_s:
            for pid in left:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
            time.sleep(0.05)
        return found + [f"process {pid} is left: {Path(f'/proc/{pid}/cmdline').read_bytes()[:100]!r}" for pid in left]

    def close(self) -> None:
        for pid in children() - self.children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for listener in self.listeners:
            listener.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def traces(path: Path) -> tuple[int, ...]:
    stat = path.lstat()
    return stat.st_mode, stat.st_uid, stat.st_nlink, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def children() -> set[int]:
    """The children of this process, by /proc: also orphans."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.add(int(stat.parent.name))
    return found
