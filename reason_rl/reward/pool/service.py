"""The verifier service: runs every reward in worker processes, so that a hang or crash cannot stop training.

Third stage of a step, in parallel with the second: completions are submitted as they finish, graded while
others are sampled, and collected at the end. A *kind* is a function with a deadline and a memory limit. Each
kind has its own workers: fresh interpreters (worker.py) that import only what its function needs. One thread
owns one worker, so grading works off the main thread, in every torchrun rank and under pytest. A worker that
dies or passes a deadline is killed with its process group and replaced; only its current request becomes
ungradable.

Left out: grading on other machines; retries of ungradable requests (a verdict must not depend on luck).
"""

from __future__ import annotations

import pickle
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from reason_rl.answers.verdict import Verdict, ungradable
from reason_rl.reward.pool.handle import GRACE_S, START_DEADLINE_S, WorkerProcess, WorkerStartError
from reason_rl.reward.pool.worker import Verify

Request = Mapping[str, Any]
"""Plain values that can be pickled."""
SLACK_S = 60.0
"""Added to all deadlines, for a busy machine, before a kind that gives no verdict counts as broken."""


@dataclass(frozen=True)
class Kind:
    """`Kind("math", grade_math, deadline_s=5.0, memory_bytes=1 << 30)`"""

    name: str
    function: Verify
    """Called in a worker's main thread as function(request, **options) -> Verdict. A function of a module: it
    travels by its name, so the worker imports that module and no other."""
    deadline_s: float
    """Of one request. Python code is interrupted at the deadline; other code is killed GRACE_S later."""
    memory_bytes: int = 0
    """Limit of a worker's address space; 0: none."""
    options: Mapping[str, Any] = field(default_factory=dict)
    prepare: Callable[..., Any] | None = None
    """Called with the options at a worker's start, for loading outside of any request's deadline."""
    batch: int = 64
    """Most requests sent to a worker at once: 1 for slow kinds."""
    num_workers: int = 0
    """0: the service's num_workers."""

    def __post_init__(self) -> None:
        pickle.dumps((self.function, self.prepare))  # raises for a lambda or an inner function, which no worker can import


@dataclass
class _Task:
    request: bytes
    """Pickled in `submit`, so that an error shows there and later changes to the request have no effect."""
    future: Future[Verdict]
    is_second_try: bool = False
    """A worker died before it began this one."""


@dataclass
class _State:
    """The threads' shared state, guarded by `changed`. They refer to it and not to the service, so that the
    service is closed when the last reference to it goes."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    queues: dict[str, deque[_Task]] = field(default_factory=dict)
    threads: dict[str, list[threading.Thread]] = field(default_factory=dict)
    idle: Counter[str] = field(default_factory=Counter)
    processes: set[WorkerProcess] = field(default_factory=set)
    is_closed: bool = False
    num_queued: int = 0
    num_pending: int = 0
    busy_since_s: float = 0.0
    busy_s: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    num_done: Counter[str] = field(default_factory=Counter)
    """Batches taken and verdicts given, by kind: the kind works as long as this grows."""
    queue_peak: int = 0


class VerifierService:
    """Grades requests of the given kinds. Threads and workers start when needed, and end with `close`."""

    def __init__(self, kinds: Iterable[Kind], num_workers: int = 2, max_queued: int = 4096) -> None:
        if num_workers < 1 or max_queued < 1:
            raise ValueError(f"num_workers and max_queued must be at least 1, got {num_workers} and {max_queued}")
        self.kinds = {kind.name: kind for kind in kinds}
        self.num_workers, self.max_queued = num_workers, max_queued
        self._state = _State(queues={name: deque() for name in self.kinds}, threads={name: [] for name in self.kinds})
        self._finalizer = weakref.finalize(self, _close, self._state)  # also at exit, and when the service is garbage

    def submit(self, kind: str, request: Request) -> Future[Verdict]:
        """Queues a request; waits while max_queued requests are not yet begun."""
        # Pickle it. Objects may raise anything while pickled.
        if kind not in self.kinds:
            raise ValueError(f"expected one of the kinds {sorted(self.kinds)}, got {kind!r}")
        state, future = self._state, Future[Verdict]()
        future.set_running_or_notify_cancel()  # callers cannot cancel it
        try:
            task, refused = _Task(pickle.dumps(request), future), None
        except Exception as error:
            task, refused = _Task(b"", future), ungradable("raised", f"the request cannot be sent: {error}")

        # Queue it, and start a worker if need be.
        with state.changed:
            state.changed.wait_for(lambda: state.num_queued < self.max_queued or state.is_closed)
            if state.is_closed:
                raise ValueError("the verifier service is closed")
            if state.num_pending == 0:
                state.busy_since_s = time.monotonic()
            state.num_pending += 1
            if refused is None:
                state.queues[kind].append(task)
                state.num_queued += 1
                state.queue_peak = max(state.queue_peak, state.num_queued)
                refused = self._need_worker(kind)
                if refused is not None:
                    state.queues[kind].pop()
                    state.num_queued -= 1
                state.changed.notify_all()
        if refused is not None:
            _finish(state, kind, task, refused)
        return future

    def result(self, kind: str, future: Future[Verdict]) -> Verdict:
        """Waits as long as verdicts of this kind keep coming.

        Each worker gives one within the deadlines of its start and of a request. If none comes in that time
        plus SLACK_S, the service is broken and the request ungradable.
        """
        patience_s = START_DEADLINE_S + self.kinds[kind].deadline_s + GRACE_S + SLACK_S
        while True:
            seen = self._state.num_done[kind]
            try:
                return future.result(timeout=patience_s)
            except TimeoutError:
                if self._state.num_done[kind] == seen:
                    return ungradable("stalled", f"no verdict of the kind {kind!r} in {patience_s:.0f} s")

    def grade(self, kind: str, requests: Sequence[Request]) -> list[Verdict]:
        """Submits all requests and waits; verdicts in the same order."""
        return [self.result(kind, future) for future in [self.submit(kind, request) for request in requests]]

    def take_metrics(self) -> dict[str, float]:
        """Counts since the last call. gradings_per_s excludes the time without pending requests."""
        state = self._state
        with state.changed:
            now = time.monotonic()
            busy_s = state.busy_s + (now - state.busy_since_s if state.num_pending else 0.0)
            counts, peak = state.counts, state.queue_peak
            state.counts, state.queue_peak, state.busy_s, state.busy_since_s = Counter(), state.num_queued, 0.0, now
        graded = counts.pop("gradings", 0)
        missed = counts.get("ungradable/deadline", 0)
        return {"gradings": float(graded), "gradings_per_s": graded / busy_s if graded and busy_s > 0 else 0.0,
                "deadlines_met": 1 - missed / graded if graded else 1.0, "worker_restarts": float(counts.pop("restarts", 0)),
                "queue_peak": float(peak), **{name: float(count) for name, count in sorted(counts.items())}}

    def worker_pids(self) -> list[int]:
        with self._state.changed:
            return [process.pid for process in self._state.processes]

    def close(self) -> None:
        """Ends all workers; requests without a verdict become ungradable ("closed")."""
        self._finalizer()

    def __enter__(self) -> VerifierService:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _need_worker(self, name: str) -> Verdict | None:
        """Starts one more thread if all threads of the kind are busy and it may have more.

        Returns a verdict if the kind has no thread and none can be started. The caller holds `changed`.
        """
        state, kind = self._state, self.kinds[name]
        threads = state.threads[name]
        if len(state.queues[name]) > state.idle[name] and len(threads) < (kind.num_workers or self.num_workers):
            thread = threading.Thread(
                target=_serve, args=(state, kind, kind.num_workers or self.num_workers), name=f"verify-{name}", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # the machine is out of threads
                return None if threads else ungradable("start", str(error))
            threads.append(thread)
        return None


def _close(state: _State) -> None:
    with state.changed:
        state.is_closed = True
        processes = list(state.processes)
        state.changed.notify_all()
    for name in state.queues:
        _close_queue(state, name)
    for process in processes:
        process.kill()
    for thread in [thread for threads in state.threads.values() for thread in threads]:
        if thread is not threading.current_thread():
            thread.join(timeout=10)


def _serve(state: _State, kind: Kind, num_workers: int) -> None:
    """A thread's main loop: take a batch, have the worker grade it, until the service is closed."""
    worker: WorkerProcess | None = None
    has_failed = False
    try:
        while tasks := _take(state, kind, num_workers):
            try:
                if worker is None:
                    worker = _start(state, kind, has_failed)
                unfinished = _grade_batch(state, kind.name, worker, tasks)
            except WorkerStartError as error:
                _finish_all(state, kind.name, tasks, ungradable("start", str(error)))
                continue
            except Exception as error:  # a bug in the service: if it ended this thread, the kind would never answer again
                _finish_all(state, kind.name, tasks, ungradable("crash", f"{type(error).__name__} in the service: {error}"))
                unfinished = []

            # The worker is lost: end it, and queue the requests that it did not begin.
            if unfinished is not None:
                if worker is not None:
                    _stop(state, worker)
                worker, has_failed = None, True
                _put_back(state, kind.name, unfinished)
    finally:
        if worker is not None:
            _stop(state, worker)


def _put_back(state: _State, name: str, tasks: Sequence[_Task]) -> None:
    """Returns tasks to the head of the queue, in order."""
    with state.changed:
        state.queues[name].extendleft(reversed(tasks))
        state.num_queued += len(tasks)
        state.changed.notify_all()
        is_closed = state.is_closed
    if is_closed:
        _close_queue(state, name)


def _take(state: _State, kind: Kind, num_workers: int) -> list[_Task]:
    """Takes the next batch: this worker's fraction of the queue, at most kind.batch; [] once closed."""
    queue = state.queues[kind.name]
    with state.changed:
        state.idle[kind.name] += 1
        state.changed.wait_for(lambda: queue or state.is_closed)
        state.idle[kind.name] -= 1
        if state.is_closed:
            return []
        count = min(kind.batch, max(1, -(-len(queue) // num_workers)))
        tasks = [queue.popleft() for _ in range(min(count, len(queue)))]
        state.num_queued -= len(tasks)
        state.num_done[kind.name] += 1
        state.changed.notify_all()
        return tasks


def _close_queue(state: _State, name: str) -> None:
    with state.changed:
        waiting = list(state.queues[name])
        state.queues[name].clear()
        state.num_queued -= len(waiting)
    _finish_all(state, name, waiting, ungradable("closed"))


def _start(state: _State, kind: Kind, is_restart: bool) -> WorkerProcess:
    try:
        worker = WorkerProcess(kind.function, kind.options, kind.deadline_s, kind.memory_bytes, kind.prepare)
    except OSError as error:  # the machine is out of processes, memory or descriptors
        raise WorkerStartError(f"{type(error).__name__}: {error}") from error
    # Register it, so that close() kills it; the service may have been closed while it started.
    with state.changed:
        state.processes.add(worker)
        state.counts["restarts"] += is_restart
        closed = state.is_closed
    if closed:
        worker.kill()
    try:
        worker.wait_until_ready()
    except BaseException:
        _stop(state, worker)
        raise
    return worker


def _stop(state: _State, worker: WorkerProcess) -> None:
    worker.kill()
    with state.changed:
        state.processes.discard(worker)


def _grade_batch(state: _State, name: str, worker: WorkerProcess, tasks: Sequence[_Task]) -> list[_Task] | None:
    """None if all were graded. Else the worker is lost, and the tasks returned are for another worker."""
    num_done = 0
    for verdict in worker.grade([task.request for task in tasks]):
        if isinstance(verdict, Verdict):
            _finish(state, name, tasks[num_done], verdict)
            num_done += 1
        elif verdict.index < 0:  # lost before it began, so no request is to blame: each gets a second try
            _finish_all(state, name, [task for task in tasks if task.is_second_try], verdict.verdict)
            return [replace(task, is_second_try=True) for task in tasks if not task.is_second_try]
        else:  # the current request is to blame; those before it were graded but not sent, those after it not begun
            culprit = max(num_done, verdict.index)
            _finish(state, name, tasks[culprit], verdict.verdict)
            return [task for index, task in enumerate(tasks) if index >= num_done and index != culprit]
    return None


def _finish_all(state: _State, name: str, tasks: Iterable[_Task], verdict: Verdict) -> None:
    """Gives the verdict to all tasks without one."""
    for task in tasks:
        if not task.future.done():
            _finish(state, name, task, verdict)


def _finish(state: _State, name: str, task: _Task, verdict: Verdict) -> None:
    with state.changed:
        state.counts["gradings"] += 1
        if not verdict.is_graded:
            state.counts[f"ungradable/{verdict.cause}"] += 1
        state.num_done[name] += 1
        state.num_pending -= 1
        if state.num_pending == 0:
            state.busy_s += time.monotonic() - state.busy_since_s
    task.future.set_result(verdict)
