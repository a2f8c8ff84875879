"""What runs in a verifier's worker process: take requests, call the kind's function, send verdicts.

Started by process.py in a fresh interpreter. It dies with the trainer (the kernel sends SIGKILL, and its socket closes),
limits its own memory, and interrupts a request at its deadline by a timer, which only a main thread can have: this one is
ours. What a function raises, sys.exit included, is a verdict. Imports the standard library only; the function brings the
rest.
"""

from __future__ import annotations

import ctypes
import importlib
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
PR_SET_PDEATHSIG = 1
FLUSH_S = 0.005
"""Verdicts are sent together, but none waits longer than this while another request is begun."""

Verify = Callable[..., Verdict]


class Deadline(BaseException):
    """Raised in the function at its deadline; no `except Exception` on the way swallows it."""


def main(parent_pid: int, connection_fd: int, progress_fd: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:
        return  # the trainer ended before the line above
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, _on_alarm)
    os.dup2(2, 1)  # what a function prints goes where errors go, never into a protocol
    os.set_inheritable(connection_fd, False)
    os.set_inheritable(progress_fd, False)
    connection, progress = Connection(connection_fd), mmap.mmap(progress_fd, PROGRESS.size)
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
    """The function, under the memory limit and with what it needs loaded; or the reason why there is none."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if setup["memory_bytes"]:
        resource.setrlimit(resource.RLIMIT_AS, (setup["memory_bytes"],) * 2)
    name = setup["function"]
    try:
        verify: Verify = _named(name)
        if name := setup["prepare"]:
            _named(name)(**setup["options"])
        return verify, ""
    except BaseException as error:
        return ungradable, f"{name}: {type(error).__name__}: {error}"


def _named(entry_point: str) -> Callable[..., Any]:
    module, _, name = entry_point.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found


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
    """The function's verdict, or why there is none; raises nothing."""
    try:
        signal.setitimer(signal.ITIMER_REAL, deadline_s)
        try:
            verdict = verify(pickle.loads(request), **options)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        if not isinstance(verdict, Verdict):
            return ungradable("raised", f"TypeError: a verifier returns a Verdict, got {type(verdict).__name__}")
        json.dumps(verdict.to_wire())
        return verdict
    except Deadline:
        return ungradable("deadline", f"no verdict within {deadline_s:g} s")
    except MemoryError:
        return ungradable("memory", "the worker's memory limit was reached")
    except BaseException as error:
        return ungradable("raised", f"{type(error).__name__}: {error}")
