"""Runs one program against its tests, in two jails, and returns an `Outcome`.

The candidate's jail gets the program's source only. The examiner's jail gets the tests, calls the program
over a channel of plain values (wire.py) and compares there. So a program cannot read its tests, change
`assert` or `==`, or claim to have passed.

Whatever a program does to its jails counts as its failure: a hang, a crash, too much memory or output. Only
"tests" (no program can pass them) and "sandbox" (no jail could be made) are not its fault.

Left out: programs judged by their output, functions judged by changes to their arguments, packages besides
Python's standard library.
"""

from __future__ import annotations

import builtins
import json
import os
import selectors
import signal
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from reason_rl.sandbox.examiner import GARBAGE, GONE
from reason_rl.sandbox.sandbox import Jail, Limits

MAX_RESULT_BYTES = 64 << 10
POLL_S = 0.05
KILLED = {256 - signal.SIGXCPU, 256 - signal.SIGKILL}
"""Exit statuses that only the processor-time limit causes, in a jail that was not killed from here."""

Failure = Literal["", "failed", "raised", "crash", "memory", "deadline", "output", "files", "tests", "sandbox"]


@dataclass(frozen=True)
class Exam:
    """`Exam(("assert f(2) == 4", "assert f(3) == 9"), names=("f",))`"""

    tests: tuple[str, ...]
    """Python statements, each one test."""
    names: tuple[str, ...]
    """The names in them that the program must define."""
    setup: str = ""
    """Python statements that run before the tests."""
    modules: tuple[str, ...] = ()
    """Standard modules that the tests use without an import."""
    is_partial: bool = False
    """Run the tests after the first that fails too, to count those that pass."""


@dataclass(frozen=True)
class Outcome:
    """`Outcome("")`: every test passed. `Outcome("raised", 1, "KeyError")`: one passed, the next raised."""

    failure: Failure
    num_passed: int = 0
    detail: str = ""


def run_exam(source: str, exam: Exam, limits: Limits, mechanisms: tuple[str, ...]) -> Outcome:
    """mechanisms: those of `usable_mechanisms`, of which both jails are made."""
    try:
        return _run_exam(source, exam, limits, mechanisms)
    except OSError as error:  # the machine is out of processes, descriptors or space
        return Outcome("sandbox", detail=f"{type(error).__name__}: {error}")


def _run_exam(source: str, exam: Exam, limits: Limits, mechanisms: tuple[str, ...]) -> Outcome:
    # Run both jails until the examiner has written its result, or must be stopped.
    ends = socket.socketpair()
    with (Jail("candidate", {"source": source}, limits, mechanisms, ends[0]) as candidate,
          Jail("examiner", asdict(exam), limits, mechanisms, ends[1]) as examiner):
        data, stopped = _watch(candidate, examiner, limits, may_overflow="namespaces" not in mechanisms)
        result = _read(data)
        is_cut = not data or (result is not None and result.get("failure") == GONE)
        if is_cut and not stopped:
            _wait(candidate)  # for its own exit status, before end() kills it
        exit_status = candidate.end()
        examiner.end()

    # If the program never ran, a jail failed. Output or files are the candidate's doing, whatever the
    # examiner's state.
    for jail in (candidate, examiner):
        counts = is_cut and (jail is candidate or stopped not in ("output", "files"))
        if counts and jail.final_status != "held":
            return Outcome("sandbox", detail=jail.final_status)
    if stopped:
        return Outcome(stopped)
    if result is None:
        return Outcome("crash", detail="the examiner ended without a result")
    return _outcome(result, exit_status, len(exam.tests))


def _watch(candidate: Jail, examiner: Jail, limits: Limits, may_overflow: bool) -> tuple[bytes, Failure]:
    """(the examiner's result, "") or (b"", the limit at which the watch ended)."""
    end_s = time.monotonic() + limits.deadline_s
    result, num_output_bytes = b"", 0
    with selectors.DefaultSelector() as selector:
        for source in (examiner.answer, examiner.output, candidate.output):
            selector.register(source, selectors.EVENT_READ)
        while (left_s := end_s - time.monotonic()) > 0:
            # Read what has come: the result ends with its pipe, output is counted and dropped.
            for key, _ in selector.select(min(left_s, POLL_S) if may_overflow else left_s):
                data = os.read(key.fd, 1 << 16)
                if not data:
                    if key.fd == examiner.answer:
                        return result, ""
                    selector.unregister(key.fd)
                result += data if key.fd == examiner.answer else b""
                num_output_bytes += len(data) if key.fd == candidate.output else 0

            # Check the limits that the kernel does not enforce.
            if num_output_bytes > limits.output_bytes or len(result) > MAX_RESULT_BYTES:
                return b"", "output"
            if may_overflow and candidate.overflows(limits):
                return b"", "files"
    return b"", "deadline"


def _wait(jail: Jail) -> None:
    end_s = time.monotonic() + 1
    while jail.process.poll() is None and time.monotonic() < end_s:
        time.sleep(0.002)


def _read(data: bytes) -> dict[str, Any] | None:
    """The examiner's result; None if it ended before it was complete."""
    try:
        result = json.loads(data)
    except ValueError:
        return None
    return result if isinstance(result, dict) else None


def _outcome(result: Mapping[str, Any], exit_status: int, num_tests: int) -> Outcome:
    if "broken" in result:
        return Outcome("tests", detail=result["broken"])
    num_passed, error_name = int(result["passed"]), str(result["failure"])
    if num_passed == num_tests:
        return Outcome("", num_passed)
    failure: Failure
    if error_name in (GONE, GARBAGE):
        failure = "deadline" if exit_status in KILLED and error_name == GONE else "crash"
    else:
        names: dict[str, Failure] = {"MemoryError": "memory", "AssertionError": "failed"}
        failure = names.get(error_name, "raised")
    detail = error_name if hasattr(builtins, error_name) else ""  # the program names its classes
    return Outcome(failure, num_passed, detail)
