"""The code reward: does the program pass the problem's tests? Run where it can do no harm and cannot see what it is asked.

    sandbox.py    which mechanisms hold here, and one jail's start and end (in the worker)
    jail.py       the child that shuts itself in; syscalls.py, what it needs of the kernel
    candidate.py  in one jail: the completion's program       examiner.py  in another: the tests; wire.py, what passes between
    names.py      which names in the tests are the program's
    trial.py      the hostile program that a machine must withstand before anything is run on it

`run_code` is the service's entry. What a candidate brings upon itself (a hang, a crash, too much memory or output) is wrong, with
that word as its cause: nothing that it does makes it ungradable. Ungradable are a jail that could not be made and tests that no
program can pass: they do not compile, leave open which names are the program's (names.py), pass what does not travel.

Left out: programs judged by what they print, functions judged by what they do to their arguments, packages beyond Python's own.
"""

from __future__ import annotations

import builtins
import json
import os
import selectors
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from reason_rl.answers.verdict import RIGHT, Verdict, ungradable, wrong
from reason_rl.reward.accuracy import extract_answer
from reason_rl.sandbox.sandbox import Jail, Limits, SandboxError, known_mechanisms, require_sandbox, usable_mechanisms

if TYPE_CHECKING:
    from reason_rl.config import RewardConfig

__all__ = ["Limits", "SandboxError", "code_options", "extract_code", "require_sandbox", "run_code"]

MAX_SOURCE_CHARACTERS = 256 << 10
MAX_ANSWER_BYTES = 64 << 10
POLL_S = 0.05
KILLED = {256 - signal.SIGXCPU, 256 - signal.SIGKILL}
"""Exit statuses that only the processor-time limit leads to, when nobody here killed the jail."""


def code_options(config: RewardConfig) -> dict[str, Any]:
    """What `run_code` takes beside the request: plain values, for the service's `Kind`."""
    return {"sandbox": config.code_sandbox, "mechanisms": known_mechanisms(config.code_sandbox),
            "is_partial": config.code_partial, "deadline_s": config.code_deadline_s, "cpu_s": config.code_cpu_s,
            "memory_bytes": config.code_memory_mb << 20, "file_bytes": config.code_file_mb << 20,
            "output_bytes": config.code_output_kb << 10, "threads": config.code_threads}


def run_code(request: Mapping[str, Any], sandbox: str = "any", mechanisms: Sequence[str] = (), is_partial: bool = False,
             **limits: Any) -> Verdict:
    """request: {"text": the completion, "facts": {"tests": [Python statements], "setup": Python run before them, "entry_points":
    [the program's names in them]}}, the last two where there are any.

    mechanisms: what the trainer found to hold, so that no worker's first request has to wait for a trial; none: tried here.
    """
    try:
        use = tuple(mechanisms) or usable_mechanisms(sandbox)
    except (SandboxError, OSError) as error:
        return ungradable("sandbox", str(error))
    facts = request["facts"]
    if not facts.get("tests"):
        return ungradable("tests", "the problem has no tests")
    source = extract_code(request["text"])
    if source is None:
        return wrong("no_answer")
    if len(source) > MAX_SOURCE_CHARACTERS:
        return wrong("too_long", f"at most {MAX_SOURCE_CHARACTERS} characters, got {len(source)}")
    exam = {"setup": facts.get("setup", ""), "tests": list(facts["tests"]), "entry_points": list(facts.get("entry_points", ())),
            "partial": is_partial}
    try:
        return _grade(source, exam, Limits(**limits), use)
    except OSError as error:  # no process, no descriptor, no space to be had: the machine's trouble
        return ungradable("sandbox", f"{type(error).__name__}: {error}")


def extract_code(text: str) -> str | None:
    """The program in a completion: after its thought, inside its one <answer> block if it has one, the last fenced block there.

    In an answer block without fences all of it is program. None: no program, several answer blocks, a fence that never closes.
    """
    answer = text.rpartition("</think>")[2]
    has_tags = "<answer>" in answer or "</answer>" in answer
    if has_tags:
        block = extract_answer(answer)
        if block is None:
            return None
        answer = block
    program: str | None = None
    lines: list[str] | None = None
    for line in answer.split("\n"):
        if lines is None:
            lines = [] if line.strip().startswith("```") else None
        elif line.strip() == "```":
            program, lines = "\n".join(lines), None
        else:
            lines.append(line)
    if lines is not None:
        return None
    return answer if program is None and has_tags and answer else program


def _grade(source: str, exam: Mapping[str, Any], limits: Limits, use: tuple[str, ...]) -> Verdict:
    ends = socket.socketpair()
    with (Jail("candidate", {"source": source}, limits, use, ends[0]) as candidate,
          Jail("examiner", dict(exam), limits, use, ends[1]) as examiner):
        answer, stopped = _watch(candidate, examiner, limits, may_overflow="namespaces" not in use)
        is_cut = not answer or b'"(gone)"' in answer
        if is_cut and not stopped:
            _wait(candidate)  # for its own exit status, before it gets ours
        code = candidate.end()
        examiner.end()
    for jail in (candidate, examiner):
        is_to_blame = is_cut and (jail is candidate or stopped not in ("output", "files"))
        if is_to_blame and jail.final_status != "held":  # nothing has run in it, so this is no program's doing
            return ungradable("sandbox", jail.final_status)
    if stopped:
        return wrong(stopped)
    verdict = _verdict(answer, code, len(exam["tests"]))
    return verdict if exam["partial"] else replace(verdict, value=float(verdict.status == "right"))


def _watch(candidate: Jail, examiner: Jail, limits: Limits, may_overflow: bool) -> tuple[bytes, str]:
    """(what the examiner wrote, why it was not waited for)."""
    deadline_s = time.monotonic() + limits.deadline_s
    answer, num_output_bytes = b"", 0
    with selectors.DefaultSelector() as selector:
        for source in (examiner.answer, examiner.output, candidate.output):
            selector.register(source, selectors.EVENT_READ)
        while (left_s := deadline_s - time.monotonic()) > 0:
            for key, _ in selector.select(min(left_s, POLL_S) if may_overflow else left_s):
                part = os.read(key.fd, 1 << 16)
                if not part:
                    if key.fd == examiner.answer:
                        return answer, ""
                    selector.unregister(key.fd)
                answer += part if key.fd == examiner.answer else b""
                num_output_bytes += len(part) if key.fd == candidate.output else 0
            if num_output_bytes > limits.output_bytes or len(answer) > MAX_ANSWER_BYTES:
                return b"", "output"
            if may_overflow and candidate.overflows(limits):
                return b"", "files"
    return b"", "deadline"


def _wait(jail: Jail) -> None:
    until_s = time.monotonic() + 1
    while jail.process.poll() is None and time.monotonic() < until_s:
        time.sleep(0.002)


def _verdict(answer: bytes, exit_status: int, num_tests: int) -> Verdict:
    try:
        result = json.loads(answer)
    except ValueError:
        return wrong("crash", "the examiner ended without a verdict")
    if "broken" in result:
        return ungradable("tests", result["broken"])
    passed, failure = int(result["passed"]), str(result["failure"])
    if passed == num_tests:
        return RIGHT
    if failure in ("(gone)", "(garbage)"):  # as examiner.py has it
        cause = "deadline" if exit_status in KILLED and failure == "(gone)" else "crash"
    else:
        cause = {"MemoryError": "memory", "AssertionError": "failed"}.get(failure, "raised")
    detail = failure if hasattr(builtins, failure) else ""  # a class of the candidate's may have any name
    return Verdict("wrong", cause, passed / num_tests, detail)
