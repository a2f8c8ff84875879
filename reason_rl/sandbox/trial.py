"""The trial program: attempts whatever a jail must prevent, and reports what succeeded. Every attempt is
harmless.

sandbox.py runs it inside a jail before any other program. Never imported.
"""

import ctypes
import fcntl
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def trial(outside: str, port: int, parent: int, memory_bytes: int, file_bytes: int, threads: int) -> list[str]:
    """The names of the attempts that succeeded. parent: its process id, or 0 in a namespace."""
    # Files, the network, programs, limits.
    secret = Path(outside, "secret")
    tries: dict[str, Callable[[], Any]] = {
        "writing outside": Path(outside, "new").touch,
        "changing a file outside": lambda: secret.write_text("x"),
        "reading outside": secret.read_text,
        "truncating outside": lambda: os.truncate(secret, 1),
        "metadata outside": lambda: os.chmod(outside, 0o777),
        "times outside": lambda: os.utime(secret),
        "removing outside": secret.unlink,
        "writing to the library": lambda: os.open(os.__file__, os.O_WRONLY),
        "reading /proc": lambda: os.open("/proc/self/mem", os.O_RDONLY),
        "TCP": lambda: socket.create_connection(("127.0.0.1", port), timeout=1),
        "UDP": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", port)),
        "a program": lambda: os.posix_spawn("/bin/true", ["true"], {}),
        "more memory": lambda: bytearray(memory_bytes),
        "more processor time": lambda: resource.setrlimit(resource.RLIMIT_CPU, (10**6, 10**6)),
        "a bigger file": lambda: Path("big").write_bytes(bytes(file_bytes + 1)),
        "processes": lambda: start_too_many(start_process, threads),
        "threads": lambda: start_too_many(start_thread, threads),
    }

    # The process that started the jail.
    if parent:
        tries |= {
            "signals to the parent": lambda: os.kill(parent, 0),
            "limits of the parent": lambda: resource.prlimit(parent, resource.RLIMIT_NOFILE),
            "priority of the parent": lambda: os.setpriority(os.PRIO_PROCESS, parent, os.getpriority(os.PRIO_PROCESS, parent)),
            "outliving the parent": outlive_parent,
            "signals to the parent by a descriptor": lambda: fcntl.fcntl(0, fcntl.F_SETOWN, parent),
        }
    return [name for name, attempt in tries.items() if succeeds(attempt)]


def succeeds(attempt: Callable[[], Any]) -> bool:
    try:
        attempt()
    except (OSError, MemoryError, ValueError, RuntimeError):
        return False
    return True


def outlive_parent() -> None:
    pr_set_pdeathsig = 1
    if ctypes.CDLL(None).prctl(pr_set_pdeathsig, 0, 0, 0, 0):
        raise OSError("refused")


def start_too_many(start: Callable[[], Callable[[], Any]], limit: int) -> None:
    """start: starts one process or thread, and returns the function that ends it."""
    ends = []
    try:
        for _ in range(limit + 3):
            ends.append(start())
    finally:
        for end in ends:
            end()


def start_process() -> Callable[[], Any]:
    child = os.fork()
    if not child:
        time.sleep(10)
        os._exit(0)

    def end() -> None:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return end


def start_thread() -> Callable[[], Any]:
    stop = threading.Event()
    threading.stack_size(1 << 16)
    threading.Thread(target=stop.wait).start()
    return stop.set
