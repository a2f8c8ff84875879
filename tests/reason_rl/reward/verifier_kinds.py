"""Kinds for the tests of the verifier service: well-behaved, slow, and failing in every way."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reason_rl.answers.verdict import RIGHT, Verdict, graded


def echo(request: Mapping[str, Any], plus: float = 0.0) -> Verdict:
    return graded(request["x"] + plus)


def where(request: Mapping[str, Any]) -> Verdict:
    """The worker process as the function sees it."""
    facts = {"torch": "torch" in sys.modules, "main_thread": threading.current_thread() is threading.main_thread(),
             "pid": os.getpid(), "leads_group": os.getpgrp() == os.getpid(), "files": len(os.listdir("/proc/self/fd"))}
    return Verdict("right", value=1.0, parts={name: float(value) for name, value in facts.items()})


def hang(way: str) -> None:
    if way == "hang deaf":  # no exception can interrupt it
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
        time.sleep(60)
    while True:
        try:
            time.sleep(60 if way == "swallow" else 0)
        except BaseException:
            if way == "loop":
                raise


def behave(request: Mapping[str, Any]) -> Verdict:
    """Does what the request asks for."""
    match request["do"]:
        case "loop" | "hang deaf" | "swallow" as way:
            hang(way)
        case "exit":
            os._exit(0)
        case "sys.exit":
            sys.exit("bye")
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "memory":
            return graded(len(bytearray(1 << 31)))
        case "raise":
            raise LookupError("nothing there")
        case "no verdict":
            return None  # type: ignore[return-value]
        case "nan":
            return graded(float("nan"))
        case "print":
            print("[[\"right\", \"\", 1.0, \"\", {}]]" * 1000, flush=True)
        case "forge":  # sends something other than a verdict through the trainer's connection
            for fd in map(int, os.listdir("/proc/self/fd")):
                with contextlib.suppress(OSError):
                    if fd > 2 and stat.S_ISSOCK(os.fstat(fd).st_mode):
                        os.write(fd, struct.pack("!i", len(request["bytes"])) + request["bytes"])
            time.sleep(60)
        case "close":  # every file, the connection to the trainer among them
            os.closerange(3, 100)
        case "child":  # a process that outlives its worker, unless its group is ended
            child = subprocess.Popen(["sleep", "60"])
            Path(request["note"]).write_text(str(child.pid))
            time.sleep(60)
        case "nap":
            time.sleep(request["s"])
    return RIGHT


def where_now(request: Mapping[str, Any]) -> Verdict:
    """Never returns the same value twice."""
    return graded(time.perf_counter())


PREPARED: list[float] = []


def prepare(seconds: float) -> None:
    time.sleep(seconds)
    PREPARED.append(seconds)


def prepared(request: object, seconds: float) -> Verdict:
    return graded(len(PREPARED))
