"""One worker process, seen from the trainer: start it, send it requests, tell which one it hung or died on, end it.

Owned by one thread of service.py. The worker (worker.py) is a fresh interpreter in a session of its own, joined by a socket
pair and by a page of shared memory in which it notes the request it is at and since when, so that a deadline is one request's
and not a batch's. Replies are JSON: what comes from a worker is never unpickled.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import pickle
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

from reason_rl.answers.verdict import Verdict, ungradable

GRACE_S = 1.0
"""From the deadline, at which the worker interrupts itself, to the kill."""
MAX_REPLY_BYTES = 1 << 26
START_DEADLINE_S = 120.0
"""For a worker's imports and its kind's `prepare` (a reward model loads torch and its weights), on a machine that may be busy."""
PROGRESS = struct.Struct("qd")
"""(index in the batch of the request it is at, monotonic seconds since when); index -1 before the first."""
ENTRY = ("import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
         "from reason_rl.reward.pool.worker import main; main(*map(int, sys.argv[2:]))")


class WorkerStartError(RuntimeError):
    """The worker could not be made ready; the message has its own words."""


@dataclass(frozen=True)
class Lost:
    """The worker is gone: `index` of the request that it was at (-1: it had not begun), and the verdict on that one."""

    index: int
    verdict: Verdict


class WorkerProcess:
    def __init__(self, function: str, options: Mapping[str, Any], deadline_s: float, memory_bytes: int, prepare: str = "") -> None:
        self.deadline_s = deadline_s
        ours, theirs = Pipe()
        self._connection: Connection = ours
        page = os.memfd_create("verifier-progress")
        os.truncate(page, PROGRESS.size)
        self._progress = mmap.mmap(page, PROGRESS.size)
        package_root = str(Path(__file__).resolve().parents[3])
        paths = [package_root, *(path for path in sys.path if path != package_root)]
        fds = (theirs.fileno(), page)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONHASHSEED": "0"}
        self._process = subprocess.Popen(  # a start through fork and exec: nothing of the trainer but these two files goes along
            [sys.executable, "-c", ENTRY, json.dumps(paths), str(os.getpid()), *map(str, fds)],
            stdin=subprocess.DEVNULL, pass_fds=fds, start_new_session=True, env=environment)
        theirs.close()
        os.close(page)
        self._ending = threading.Lock()
        self._setup = {"function": function, "prepare": prepare, "options": dict(options), "deadline_s": deadline_s,
                       "memory_bytes": memory_bytes}

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_until_ready(self) -> None:
        try:
            self._connection.send_bytes(pickle.dumps(self._setup))
            if not self._connection.poll(START_DEADLINE_S):
                raise WorkerStartError(f"not ready after {START_DEADLINE_S:.0f} s")
            error = json.loads(self._connection.recv_bytes())
        except (EOFError, OSError) as lost:
            raise WorkerStartError(f"the worker died at its start: {self._ended()}") from lost
        if error:
            raise WorkerStartError(error)

    def grade(self, requests: Sequence[bytes]) -> Iterator[Verdict | Lost]:
        """A verdict for each pickled request, in order; `Lost` ends it early, after which this worker is no more."""
        self._progress[:] = PROGRESS.pack(-1, time.monotonic())
        num_done = 0
        try:
            self._connection.send_bytes(pickle.dumps(list(requests)))
            while num_done < len(requests):
                if self._connection.poll(self._patience_s()):
                    verdicts = self._receive(at_most=len(requests) - num_done)
                    num_done += len(verdicts)
                    yield from verdicts
                elif self._patience_s() <= 0:
                    index, _ = PROGRESS.unpack(self._progress)
                    self.kill()
                    yield Lost(index, ungradable("deadline", f"no verdict within {self.deadline_s:g} s; the worker was killed"))
                    return
        except (EOFError, OSError, ValueError, TypeError, RecursionError):  # gone, or what it sends is none of ours
            index, _ = PROGRESS.unpack(self._progress)
            yield Lost(index, ungradable("crash", f"the worker died: {self._ended()}"))

    def kill(self) -> None:
        """Its whole process group, at once and for good; may be called again, and from another thread."""
        with self._ending:
            if self._process.returncode is None:  # not reaped, so the group's number is still its own
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self._process.pid, signal.SIGKILL)
                self._process.kill()
                self._process.wait()

    def _receive(self, at_most: int) -> list[Verdict]:
        verdicts = [Verdict.from_wire(fields) for fields in json.loads(self._connection.recv_bytes(MAX_REPLY_BYTES))]
        if len(verdicts) > at_most:
            raise ValueError(f"at most {at_most} verdicts are expected, got {len(verdicts)}")
        return verdicts

    def _patience_s(self) -> float:
        """Seconds until the request that the worker is at must be killed."""
        _, since_s = PROGRESS.unpack(self._progress)
        return max(0.0, float(since_s) + self.deadline_s + GRACE_S - time.monotonic())

    def _ended(self) -> str:
        """How it ended. A process that is on its way out keeps its own exit status, whatever signal comes after."""
        self.kill()
        code = self._process.returncode
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
