"""The main loop of a verifier worker: receives requests, calls its kind's function, sends verdicts.

Started by handle.py in a fresh interpreter. It dies with the trainer (the kernel sends SIGKILL, and its
socket closes) and limits its own memory. At a request's deadline a timer interrupts the function; only a main
thread can have such a timer. Anything that a function raises, SystemExit included, becomes a verdict. Imports
the standard library and `Verdict` only; unpickling the function imports its module.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import pickle
import resource
import signal
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

from reason_rl.answers.verdict import Verdict, ungradable

PROGRESS = struct.Struct("qd")
"""The page shared with the trainer: (index in the batch of the current request, monotonic seconds at its
start); index -1 before the first."""
PR_SET_PDEATHSIG = 1
FLUSH_S = 0.005
"""Verdicts are sent together, but none waits longer than this before the next request begins."""

Verify = Callable[..., Verdict]


class Deadline(BaseException):
    """Raised in the function at its deadline. A BaseException, so that no `except Exception` hides it."""


def main(parent_pid: int, connection_fd: int, progress_fd: int) -> None:
    # Die with the trainer, keep its descriptors from child processes, and print to stderr only.
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:
        return  # the trainer ended before the line above
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, _on_alarm)
    os.dup2(2, 1)
    os.set_inheritable(connection_fd, False)
    os.set_inheritable(progress_fd, False)
    connection, progress = Connection(connection_fd), mmap.mmap(progress_fd, PROGRESS.size)

    # Load the function, reply "" or the error, then grade one batch after the other.
    try:
        setup = pickle.loads(connection.recv_bytes())
        verify, error = _load(setup)
        connection.send_bytes(json.dumps(error).encode())
        while not error:
            _grade_batch(pickle.loads(connection.recv_bytes()), verify, setup, connection, progress)
    except (EOFError, OSError):
        return  # the trainer closed the connection


def _on_alarm(signum: int, frame: object) -> None:
    raise Deadline


def _load(setup: Mapping[str, Any]) -> tuple[Verify, str]:
    """(the function, "") or (a stand-in, the error). Loads under the memory limit."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if setup["memory_bytes"]:
        resource.setrlimit(resource.RLIMIT_AS, (setup["memory_bytes"],) * 2)
    try:
        verify, prepare = pickle.loads(setup["functions"])
        if prepare is not None:
            prepare(**setup["options"])
        return verify, ""
    except BaseException as error:  # a user's module may raise anything; the trainer reports it
        return ungradable, f"{type(error).__name__}: {error}"


def _grade_batch(
    requests: Sequence[bytes], verify: Verify, setup: Mapping[str, Any], connection: Connection, progress: mmap.mmap
) -> None:
    done: list[list[Any]] = []
    flushed_s = time.monotonic()
    for index, request in enumerate(requests):
        now_s = time.monotonic()
        if done and now_s - flushed_s > FLUSH_S:
            connection.send_bytes(json.dumps(done).encode())
            done, flushed_s = [], now_s
        progress[:] = PROGRESS.pack(index, now_s)
        done.append(grade_one(verify, request, setup["options"], setup["deadline_s"]).to_wire())
    connection.send_bytes(json.dumps(done).encode())


def grade_one(verify: Verify, request: bytes, options: Mapping[str, Any], deadline_s: float) -> Verdict:
    """The function's verdict on a pickled request; ungradable if it raises. Raises nothing itself."""
    # The timer covers unpickling too, and is off before anything else runs.
    try:
        signal.setitimer(signal.ITIMER_REAL, deadline_s)
        try:
            verdict = verify(pickle.loads(request), **options)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        if not isinstance(verdict, Verdict):
            return ungradable("raised", f"TypeError: a verifier returns a Verdict, got {type(verdict).__name__}")
        json.dumps(verdict.to_wire())  # raises here if it cannot be sent
        return verdict
    except Deadline:
        return ungradable("deadline", f"no verdict within {deadline_s:g} s")
    except MemoryError:
        return ungradable("memory", "the worker's memory limit was reached")
    except BaseException as error:
        return ungradable("raised", f"{type(error).__name__}: {error}")
