"""The sandbox: nothing escapes it, it leaves nothing behind, and no program runs if it does not hold."""

from __future__ import annotations

import collections
import datetime
import decimal
import fractions
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reason_rl.answers.program_names import program_names
from reason_rl.sandbox import sandbox, wire
from reason_rl.sandbox.run import Exam, Outcome, run_exam
from reason_rl.sandbox.sandbox import Limits, SandboxError, require_sandbox, usable_mechanisms

MUST_HAVE_SANDBOX = bool(os.environ.get("REASON_RL_REQUIRE_SANDBOX"))
ROOT = Path(__file__).resolve().parents[3]
QUICK = Limits(deadline_s=5.0, cpu_s=3, memory_bytes=256 << 20)


@pytest.fixture
def sandboxed() -> None:
    try:
        require_sandbox()
    except SandboxError as error:
        if MUST_HAVE_SANDBOX:
            raise
        pytest.skip(str(error))


needs_sandbox = pytest.mark.usefixtures("sandboxed")


def run(program: str, *tests: str, use: tuple[str, ...] = (), is_partial: bool = False) -> Outcome:
    names, modules = program_names("\n".join(tests), ())
    exam = Exam(tests, tuple(names), modules=tuple(modules), is_partial=is_partial)
    return run_exam(program, exam, QUICK, use or usable_mechanisms())


@needs_sandbox
def test_an_outcome_counts_the_tests_passed_and_names_the_first_failure() -> None:
    tests = [f"assert f({x}) == {x * x}" for x in (0, 1, 2, 3)]
    assert run("def f(x): return x * x", *tests) == Outcome("", 4)
    assert run("def f(x): return x", *tests) == Outcome("failed", 2, "AssertionError")
    assert run("def f(x): return {0: 0, 3: 9}[x]", *tests) == Outcome("raised", 1, "KeyError")
    assert run("def f(x): return {0: 0, 3: 9}[x]", *tests, is_partial=True) == Outcome("raised", 2, "KeyError")
    assert run("class Odd(Exception): pass\ndef f(x): raise Odd", *tests) == Outcome("raised", 0, "")


@needs_sandbox
@pytest.mark.parametrize("data", ["b'{}[['", "b'[1]'", "b'[\"error\", \"(gone)\"]'"])
def test_a_program_that_sends_garbage_and_stays_is_ended_at_once(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = (f"import os, struct, time\ndata = {data}\nfor fd in range(3, 64):\n    try:\n"
               "        os.write(fd, struct.pack('!I', len(data)) + data)\n    except OSError: pass\ntime.sleep(60)")
    monkeypatch.setattr("reason_rl.sandbox.run._wait", lambda jail: pytest.fail("its exit status is waited for"))
    assert run(program, "assert f(2) == 4").failure == "crash"


@needs_sandbox
@pytest.mark.parametrize(("program", "test"), [
    ("def f(x): return x, [x], {x: x}, {x}, frozenset([x])", "assert f(1) == (1, [1], {1: 1}, {1}, frozenset([1]))"),
    ("def f(x): return x ** 1000", "assert f(10) == 10 ** 1000"),
    ("def f(x): return [float('inf'), 0.1, 1e300, -0.0]", "assert f(0) == [float('inf'), 0.1, 1e300, 0.0]"),
    ("def f(x): return (i for i in range(x))", "assert list(f(3)) == [0, 1, 2]"),
    ("from collections import Counter\ndef f(x): return Counter(x)", "assert f('aab') == {'a': 2, 'b': 1}"),
    ("from collections import namedtuple\nP = namedtuple('P', 'x y')\ndef f(x): return P(x, 2)", "assert f(1) == (1, 2)"),
    ("def f(x, kind): return kind(x)", "assert f('3', int) == 3 and f([2, 1], sorted) == [1, 2]"),
    ("class Node:\n    def __init__(self, x): self.x = x\ndef f(n): return n.x + n.left.x",
     "n = Node(1)\nn.left = Node(2)\nassert f(n) == 3 and n.left.x == 2"),
    ("def f(x):\n    raise ValueError", "try:\n    f(1)\nexcept ValueError:\n    pass\nelse:\n    assert False"),
    ("def sum(a, b): return a + b", "assert sum(10, 15) == 25"),
    ("def f(x): return x", "assert math.isclose(f(0.5), math.sqrt(0.25)) and set(f([1])) == {1}"),
    ("def check(x): return x > 1", "import random\nassert check(2) and not check(1) and random.Random(0).random() < 1"),
    ("def f(x): return open('a', 'w').write(x) and open('a').read()", "assert f('ab') == 'ab'"),
    ("import threading\ndef f(x):\n    t = threading.Thread(target=x.append, args=(1,))\n    t.start(), t.join()\n    return x",
     "assert f([]) == [1]"),
    ("import asyncio\nasync def g(x):\n    await asyncio.sleep(0)\n    return x\ndef f(x): return asyncio.run(g(x))",
     "assert f(1) == 1"),
    ("import sqlite3\ndef f(x): return sqlite3.connect(':memory:').execute('select 1 + ?', (x,)).fetchone()[0]",
     "assert f(1) == 2"),
    ("from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\ndef f(x): return P(x).x", "assert f(1) == 1"),
    ("import os\ndef f(x): return sorted(os.environ)", "assert f(0) == ['HOME', 'LC_ALL', 'PYTHONHASHSEED', 'TMPDIR', 'TZ']"),
    ("print('hello')\ndef f(x): return print(x)", "assert f('a word') is None"),
])
def test_a_right_program_is_right(program: str, test: str) -> None:
    assert not run(program, test).failure


@needs_sandbox
@pytest.mark.parametrize("use", [("namespaces",), ("landlock", "seccomp"), ("namespaces", "seccomp"),
                                 ("namespaces", "landlock", "seccomp")], ids="+".join)
def test_every_mixture_of_mechanisms_that_holds_grades_alike(use: tuple[str, ...]) -> None:
    if any(sandbox.held_mechanisms()[name] for name in use):
        pytest.skip(f"this machine has not all of {use}")
    assert sandbox.run_trial(use) == []
    assert not run("def f(x): return x * x", "assert f(2) == 4", use=use).failure
    assert run("import os\ndef f(x):\n    for _ in range(99): os.fork() or os._exit(x)", "assert f(2) is None", use=use).failure
    assert run("import os\nos.mkdir('/new')\ndef f(x): return 4", "assert f(2) == 4", use=use).failure
    files = "for i in range(40):\n    open(str(i), 'wb').write(bytes(1 << 20))\nimport time\ntime.sleep(0.2)\ndef f(x): return 4"
    assert run(files, "assert f(2) == 4", use=use).failure


@pytest.mark.parametrize("use", [(), ("landlock",), ("seccomp",)])
def test_the_trial_detects_what_a_weaker_sandbox_permits(use: tuple[str, ...]) -> None:
    assert sandbox.run_trial(use)

ALL_HELD = {"rlimits": "", "namespaces": "", "landlock": "", "seccomp": ""}
NO_NAMESPACES = {"namespaces": "namespaces: unshare: Operation not permitted"}
NO_LANDLOCK = {"landlock": "landlock: Function not implemented"}


@pytest.mark.parametrize(("wanted", "absent", "message"), [
    ("any", NO_NAMESPACES | NO_LANDLOCK, "requires namespaces or landlock.*unshare: Operation not permitted.*not implemented"),
    ("namespaces", NO_NAMESPACES, "requires namespaces, which"), ("landlock", NO_LANDLOCK, "requires landlock, which"),
    ("all", {"seccomp": "seccomp: no"}, "requires seccomp, which"), ("any", {"rlimits": "rlimits: no"}, "requires rlimits, which"),
    ("some", {}, "the required set is one of any, namespaces, landlock, all, got 'some'"),
])
def test_code_is_refused_by_the_name_of_what_does_not_hold(wanted: str, absent: dict[str, str], message: str,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "held_mechanisms", lambda: ALL_HELD | absent)
    monkeypatch.setattr(sandbox, "held_mechanisms", lambda: ALL_HELD | absent)
    monkeypatch.setattr(sandbox, "run_trial", lambda use: [])
    monkeypatch.setattr(sandbox, "TRIED", {})
    with pytest.raises(SandboxError, match=message):
        require_sandbox(wanted)


def test_code_is_refused_when_a_trial_gets_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "held_mechanisms", lambda: ALL_HELD | {"seccomp": "seccomp: no table"})
    trials: list[tuple[str, ...]] = []
    monkeypatch.setattr(sandbox, "run_trial", lambda use: trials.append(use) or ["UDP"])
    monkeypatch.setattr(sandbox, "TRIED", {})
    for _ in range(3):  # the second time without a trial
        with pytest.raises(SandboxError, match=r"landlock a trial program succeeded in: UDP \(absent: seccomp: no table\)"):
            sandbox.usable_mechanisms("any")
    assert len(trials) == 2 and sandbox.known_mechanisms("any") == ()


def test_a_jail_that_cannot_be_made_is_the_sandboxes_failure_and_nothing_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "make_scratch", lambda: ("/no/such/folder", os.open("/", os.O_RDONLY)))
    outcome = run("def f(x): return 4", "assert f(2) == 4", use=("landlock",))
    assert outcome.failure == "sandbox" and "/no/such/folder" in outcome.detail


def test_a_machine_without_processes_is_the_sandboxes_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*given: object, **more: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(subprocess, "Popen", none_left)
    outcome = run("def f(x): return 4", "assert f(2) == 4", use=("namespaces",))
    assert outcome.failure == "sandbox" and "Resource temporarily unavailable" in outcome.detail
    assert len(os.listdir("/proc/self/fd")) <= before + 1  # the examiner's end goes with the error


@needs_sandbox
def test_the_command_prints_the_mechanisms_that_hold_and_refuses_an_unknown_one() -> None:
    command = [sys.executable, "-m", "reason_rl.sandbox"]
    said = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert said.returncode == 0 and said.stdout.startswith("code sandbox: rlimits, ")
    said = subprocess.run([*command, "none"], capture_output=True, text=True, cwd=ROOT)
    assert said.returncode == 1 and "got 'none'" in said.stderr


@needs_sandbox
def test_jails_end_with_a_worker_that_is_killed() -> None:
    source = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(60)"
    program = ("from reason_rl.sandbox.run import Exam, Limits, run_exam\n"
               f"run_exam({source!r}, Exam(('f()',), ('f',)), Limits(deadline_s=60), {usable_mechanisms()!r})")
    worker = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    assert until(lambda: len(jails_of(worker.pid)) == 2 and all(map(jails_of, jails_of(worker.pid))))
    keepers = jails_of(worker.pid)
    family = {*keepers, *(inside for keeper in keepers for inside in jails_of(keeper))}
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    assert len(family) == 4 and until(lambda: not any(Path(f"/proc/{pid}").exists() and not is_zombie(pid) for pid in family))
    sandbox._remove_orphans()
    assert not list(Path(sandbox.tempfile.gettempdir()).glob(f"{sandbox.SCRATCH_PREFIX}{worker.pid}_*"))



@pytest.mark.parametrize("number", [os.getpid(), 1 << 30], ids=["own", "unused"])
def test_a_scratch_folder_is_an_orphan_only_once_its_lock_is_free(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The owner's process id decides nothing: in another process namespace it may be another process or none."""
    monkeypatch.setattr(sandbox, "SCRATCH_PREFIX", f"reason_rl_test_{os.getpid()}_")
    monkeypatch.setattr(sandbox.os, "getpid", lambda: number)
    folder, lock = sandbox.make_scratch()
    sandbox._remove_orphans()
    assert os.path.isdir(folder)
    os.close(lock)
    sandbox._remove_orphans()
    assert not os.path.exists(folder)


def until(is_so: Callable[[], bool], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not is_so() and time.monotonic() < end:
        time.sleep(0.05)
    return is_so()


def jails_of(parent: int) -> list[int]:
    stats = [path.read_text() for path in Path("/proc").glob("[0-9]*/stat") if path.exists()]
    return [int(stat.split()[0]) for stat in stats if int(stat.rpartition(")")[2].split()[1]) == parent]


def is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@needs_sandbox
def test_a_grading_leaves_no_descriptor_process_or_folder_and_works_off_the_main_thread() -> None:
    def once() -> None:
        failures.append(run("def f(x): return x * x", "assert f(2) == 4").failure)
        failures.append(run("import os\nos._exit(0)", "assert f(2) == 4").failure)

    failures: list[str] = []
    once()
    before = len(os.listdir("/proc/self/fd")), jails_of(os.getpid())
    thread = threading.Thread(target=once)
    thread.start()
    thread.join()
    assert failures == ["", "crash"] * 2
    assert (len(os.listdir("/proc/self/fd")), jails_of(os.getpid())) == before
    assert not list(Path(sandbox.tempfile.gettempdir()).glob(f"{sandbox.SCRATCH_PREFIX}{os.getpid()}_*"))


@pytest.mark.parametrize("value", [
    None, True, 0, -1, 1 << 100, -(1 << 63), 0.1, math.inf, "", "a\0\ud800é", b"\0a", bytearray(b"x"), 1 + 2j, range(1, 9, 2), (),
    (1, (2,)), [[]], {1: {"a": None}}, {(1, 2): 3}, {1, "a"}, frozenset([1]), collections.deque([1]), fractions.Fraction(1, 3),
    decimal.Decimal("1.50"), datetime.date(2024, 2, 29), datetime.datetime(2024, 1, 1, 12), datetime.timedelta(1, 2, 3),
])
def test_plain_values_come_back_as_they_went(value: Any) -> None:
    sent = json.loads(json.dumps(wire.encode(value, keep=lambda _: 0)))
    back = wire.decode(sent, find=lambda _: None)
    assert back == value and type(back) is type(value)


def test_values_of_subclasses_come_back_plain() -> None:
    class Liar(list[int]):
        def __eq__(self, other: object) -> bool:
            return True

    back = wire.decode(wire.encode([Liar([1])], keep=lambda _: 0), find=lambda _: None)
    assert type(back[0]) is list and back != [[2]]


@pytest.mark.parametrize("data", [{"os.system": ["true"]}, {}, {"a": 1, "b": 2}, {"int": 5}, {"int": "z"},
                                  {"dict": [1]}, {"set": [[]]}, {"builtins.eval": ["1"]},
                                  {"decimal.Decimal": ["a"]}, {"builtins.range": [0, 1, 0]}])
def test_a_value_that_is_not_plain_is_refused(data: Any) -> None:
    with pytest.raises((ValueError, TypeError, ArithmeticError)):
        wire.decode(data, find=lambda _: None)
