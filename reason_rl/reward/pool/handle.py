"""One worker process, as the trainer handles it: start it, send requests, notice a hang or a death, end it.

Owned by one thread of service.py. The worker (worker.py) is a fresh interpreter in its own session. A socket
pair carries requests and replies. In a page of shared memory the worker notes its current request and the
time it began, so that a deadline applies to one request and not to a batch. Replies are JSON: the trainer
never unpickles a reply.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

from reason_rl.answers.verdict import Verdict, ungradable
from reason_rl.reward.pool import worker
from reason_rl.reward.pool.worker import PROGRESS, Verify

GRACE_S = 1.0
"""From the deadline, at which the worker interrupts itself, to the kill."""
MAX_REPLY_BYTES = 1 << 26
START_DEADLINE_S = 120.0
"""For imports and the kind's `prepare` (a reward model loads torch and weights), on a busy machine."""
ENTRY = ("import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
         f"from {worker.__name__} import main; main(*map(int, sys.argv[2:]))")


class WorkerStartError(RuntimeError):
    """The worker did not become ready; the message is the worker's error."""


@dataclass(frozen=True)
class Lost:
    """The worker is gone. index: its current request, or -1 if it had not begun; verdict: on that request."""

    index: int
    verdict: Verdict


class WorkerProcess:
    def __init__(self, function: Verify, options: Mapping[str, Any], deadline_s: float, memory_bytes: int,
                 prepare: Callable[..., Any] | None = None) -> None:
        """Starts it; `wait_until_ready` sends it the function. The arguments are those of `Kind`."""
        # The connection and the shared page.
        self.deadline_s = deadline_s
        ours, theirs = Pipe()
        self._connection: Connection = ours
        page = os.memfd_create("verifier-progress")
        os.truncate(page, PROGRESS.size)
        self._progress = mmap.mmap(page, PROGRESS.size)

        # Start it by fork and exec, so that it inherits these two descriptors and nothing else.
        package_root = str(Path(__file__).resolve().parents[3])
        paths = [package_root, *(path for path in sys.path if path != package_root)]
        fds = (theirs.fileno(), page)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONHASHSEED": "0"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", ENTRY, json.dumps(paths), str(os.getpid()), *map(str, fds)],
            stdin=subprocess.DEVNULL, pass_fds=fds, start_new_session=True, env=environment)
        theirs.close()
        os.close(page)
        self._ending = threading.Lock()
        self._setup = {"functions": pickle.dumps((function, prepare)), "options": dict(options), "deadline_s": deadline_s,
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
            raise WorkerStartError(f"the worker died at its start: {self._end()}") from lost
        if error:
            raise WorkerStartError(error)

    def grade(self, requests: Sequence[bytes]) -> Iterator[Verdict | Lost]:
        """A verdict for each pickled request, in order. `Lost` ends it early; this worker is then dead."""
        self._progress[:] = PROGRESS.pack(-1, time.monotonic())
        num_done = 0
        try:
            self._connection.send_bytes(pickle.dumps(list(requests)))
            while num_done < len(requests):
                if self._connection.poll(self._patience_s()):
                    verdicts = self._receive(at_most=len(requests) - num_done)
                    num_done += len(verdicts)
                    yield from verdicts
                # No reply in time, unless the worker has begun a later request with its own deadline.
                elif self._patience_s() <= 0:
                    index, _ = PROGRESS.unpack(self._progress)
                    self.kill()
                    yield Lost(index, ungradable("deadline", f"no verdict within {self.deadline_s:g} s; the worker was killed"))
                    return
        except (EOFError, OSError, ValueError, TypeError, RecursionError):  # it died, or sent a malformed reply
            index, _ = PROGRESS.unpack(self._progress)
            yield Lost(index, ungradable("crash", f"the worker died: {self._end()}"))

    def kill(self) -> None:
        """Kills its whole process group. May be called again, and from another thread."""
        with self._ending:
            if self._process.returncode is None:  # not yet reaped, so no other group can have its number
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self._process.pid, signal.SIGKILL)
                self._process.kill()
                self._process.wait()

    def _receive(self, at_most: int) -> list[Verdict]:
        verdicts = [Verdict.from_wire(fields) for fields in json.loads(self._connection.recv_bytes(MAX_REPLY_BYTES))]
        if len(verdicts) > at_most:
            raise ValueError(f"expected at most {at_most} verdicts, got {len(verdicts)}")
        return verdicts

    def _patience_s(self) -> float:
        """Seconds until the worker must be killed for its current request."""
        _, since_s = PROGRESS.unpack(self._progress)
        return max(0.0, float(since_s) + self.deadline_s + GRACE_S - time.monotonic())

    def _end(self) -> str:
        """Kills it; returns how it ended. A process that is already exiting keeps its own exit status."""
        self.kill()
        code = self._process.returncode
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
