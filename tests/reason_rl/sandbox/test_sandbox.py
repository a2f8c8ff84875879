"""The code reward: programs that solve their tests are right, and nothing runs where the sandbox does not hold."""

from __future__ import annotations

import ast
import collections
import datetime
import decimal
import fractions
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from reason_rl.config import Config, load_config
from reason_rl.reward.code import code_options, extract_code, require_sandbox, run_code
from reason_rl.reward.pool.service import Kind, VerifierService
from reason_rl.sandbox import sandbox, wire
from reason_rl.sandbox.program_names import program_names

MUST_HAVE_SANDBOX = bool(os.environ.get("REASON_RL_REQUIRE_SANDBOX"))
NUM_WORKERS = 3 * (os.cpu_count() or 2)
"""A jail's start is half waiting, for the kernel to make and take down its namespaces."""
QUICK = {"deadline_s": 5.0, "cpu_s": 3, "memory_bytes": 256 << 20}


@pytest.fixture
def sandboxed() -> None:
    try:
        require_sandbox()
    except sandbox.SandboxError as error:
        if MUST_HAVE_SANDBOX:
            raise
        pytest.skip(str(error))


def run(program: str, *tests: str, setup: str = "", entry_points: tuple[str, ...] = (), **options: Any) -> Any:
    facts = {"tests": tests, "setup": setup, "entry_points": entry_points}
    request = {"text": f"```python\n{program}\n```", "facts": facts}
    return run_code(request, **{**QUICK, **options})


needs_sandbox = pytest.mark.usefixtures("sandboxed")


@pytest.mark.parametrize(("text", "program"), [
    ("```python\na\n```", "a"), ("```\na\nb\n```", "a\nb"), ("x\n```py\na\n```\ny", "a"), ("```\na\n```\n```\nb\n```", "b"),
    ("<answer>a</answer>", "a"), ("<answer>\n```python\na\n```\n</answer>", "a"), ("<think>```\na\n```</think>\n```\nb\n```", "b"),
    ("  ```python\n  a\n  ```", "  a"), ("```python\r\na\r\n```\r\n", "a\r"), ("```\n\n```", ""),
])
def test_the_last_fenced_block_after_the_thought_is_the_program(text: str, program: str) -> None:
    assert extract_code(text) == program


@pytest.mark.parametrize("text", [
    "", "def f(): pass", "```python\na", "```\na\n```\n```\nb", "<think>\n```\na\n```\n</think>", "<answer></answer>",
    "<answer> \n</answer>", "<answer>a</answer><answer>a</answer>",
    "<answer>a", "a</answer>", "</answer>a<answer>", "<answer>\n```\na\n</answer>\n```",
])
def test_there_is_no_program_in(text: str) -> None:
    assert extract_code(text) is None


@needs_sandbox
@pytest.mark.parametrize(("program", "cause"), [
    ("def f(x): return x", "failed"), ("def g(x): return x", "raised"), ("def f(x): raise KeyError", "raised"),
    ("def f(", "raised"),
    ("import os\ndef f(x): os._exit(0)", "crash"), ("import ctypes\nctypes.string_at(0)", "crash"),
    ("def f(x): return bytearray(1 << 30)", "memory"), ("def f(x):\n    while True: pass", "deadline"),
    ("import time\ntime.sleep(60)", "deadline"), ("while True: print('x' * 1000)", "output"),
])
def test_what_a_program_brings_upon_itself_is_wrong_and_named(program: str, cause: str) -> None:
    verdict = run(program, "assert f(2) == 4", deadline_s=2.0, cpu_s=1)
    assert (verdict.status, verdict.cause, verdict.value) == ("wrong", cause, 0.0)


@needs_sandbox
def test_a_program_of_more_characters_than_are_read_is_wrong() -> None:
    assert run("#" * (257 << 10) + "\ndef f(x): return 4", "assert f(2) == 4").cause == "too_long"
    assert run("#" * (255 << 10) + "\ndef f(x): return 4", "assert f(2) == 4").status == "right"


def all_at_once(cases: list[tuple[str, tuple[str, ...], str]]) -> list[tuple[str, str]]:
    with ThreadPoolExecutor(NUM_WORKERS) as pool:
        verdicts = list(pool.map(lambda case: run(case[0], *case[1], setup=case[2]), cases))
    return [(verdict.status, verdict.cause) for verdict in verdicts]


UNPASSABLE = [
    ((), ""), (("assert f(2) ==",), ""), (("assert f(2) == 4",), "def"), (("assert f(2) == 4",), "1 / 0"),
    (("assert f(2) == \0",), ""), (("assert f(2) == 4",), "import sys\nsys.exit()"), (("assert f(lambda: 1) == 4",), ""),
    (("def g(): pass\nassert f(g) == 4",), ""), (("import math\nassert f(math) == 4",), ""),
    (("import math\nassert f(math.sqrt) == 4",), ""), (("assert f(iter([2])) == 4",), ""),
    (("try:\n    f(lambda: 1)\nexcept BaseException:\n    pass",), ""), (("assert f('x' * 9_000_000) == 4",), ""),
    (("assert f('x' * 9_000_000) == 4",), "f(1)"), (("assert f(2) == 4", "f(lambda: 1)"), ""),
    (("assert f(2) == 4",), "f(lambda: 1)"), (("assert f(2) == 4",), "f(f)\nf(lambda: 1)"),
    (("a = []\na.append(a)\nassert f(a) == 4",), ""), (("import no_such_package\nassert f(2) == 4",), ""),
    (("from solution import f\nassert f(2) == 4",), "f"), (("assert f(2) == 4",), "import no_such_package"),
]


@needs_sandbox
def test_tests_that_no_program_can_pass_are_ungradable() -> None:
    verdicts = all_at_once([("def f(x): return 4 if callable(x) else 2 * x", *case) for case in UNPASSABLE])
    assert [case for case, verdict in zip(UNPASSABLE, verdicts) if verdict != ("ungradable", "tests")] == []


BAD_VALUES = [
    ("def f(x): return None", ("assert f(2) == 4",), "first = f(1)[0]"), ("f = None", ("assert f(2) == 4",), "f + 1"),
    ("def f(x): return object()", ("assert f(2) == 4",), "{f(1): 1}"),
    ("def f(x): return object", ("assert f(2) == 4",), "f(1) == 1"),
    ("def f(x): raise ImportError", ("assert f(2) == 4",), ""), ("def f(x): raise ImportError", ("assert f(2) == 4",), "f(1)"),
    ("def f(x): return 'x' * 8_300_000", ("assert f(f(2) + f(2)) == 4",), ""),
    ("def f(x): return 1_000_000", ("assert f('x' * f(2) * 9) == 4",), ""),
    ("def f(x):\n    a = []\n    for _ in range(300): a = [a]\n    return a",
     ("a = f(1)\nfor _ in range(900): a = [a]\nf(a)",), ""),
]


@needs_sandbox
def test_what_a_bad_value_breaks_in_the_tests_is_the_programs_fault() -> None:
    verdicts = all_at_once(BAD_VALUES)
    assert [case for case, verdict in zip(BAD_VALUES, verdicts) if verdict != ("wrong", "raised")] == []


@pytest.mark.parametrize(("source", "names"), [
    ("assert f(2) == 4", ["f"]), ("assert sum(10, 15) == 25", ["sum"]), ("assert set(f(1)) == {1}", ["f"]),
    ("assert math.isclose(f(2), 0.5)", ["f"]), ("from math import isclose\nassert isclose(f(2), 0.5)", ["f"]),
    ("def check(candidate):\n    assert candidate(2) == 4\ncheck(f)", ["f"]), ("s = Stack()\nassert s.pop() == 1", ["Stack"]),
    ("assert f([Pair(5, 24), Pair(27, 40)], 4) == 3", ["Pair", "f"]), ("assert f(Color.RED) == 3", ["Color", "f"]),
    ("root = Node(1)\nroot.left = Node(2)\nassert f(root) == 3 and root.left.x == 2", ["Node", "f"]),
])
def test_the_programs_names_are_found_in_the_tests(source: str, names: list[str]) -> None:
    assert sorted(program_names(source, ())[0]) == names


@pytest.mark.parametrize("source", [
    "assert isclose(f(2), 0.5)", "assert np.allclose(f(2), 0.5)", "x = f(2)\nassert isclose(x, 0.5)", "assertEqual(f(2), 4)",
    "def check(candidate):\n    assert isclose(candidate(2), 0.5)\ncheck(f)", "assert normal(f(2)) == 4", "assert f(2) == g(2)",
    "assert f(2) == EXPECTED", "assert f('ab') == Counter('ab')", "e = Counter('ab')\nassert f('ab') == e",
    "assert Approx(f(2), 0.5)", "x = f(2)\nassert Approx(x) == 0.5", "for e in [Counter('ab')]:\n    assert f('ab') == e",
    "def answer():\n    return f('ab')\nassert answer() == Counter('ab')", "assert abs(sum(1, 2) - 3) < 1", "assert True",
])
def test_tests_that_leave_open_whose_a_name_is_are_refused(source: str) -> None:
    with pytest.raises(ValueError, match=r"entry_points|nothing of the program's"):
        program_names(source, ())


def test_entry_points_say_whose_a_name_is() -> None:
    assert program_names("assert decode(encode('a')) == 'a'", ["encode", "decode"])[0] == ["decode", "encode"]
    assert program_names("assert abs(sum(1, 2) - 3) < 1", ["sum"])[0] == ["sum"]
    for source in ("assert isclose(f(2), 0.5)", "assert 1 == 1", "f = 1\nassert f == 1"):
        with pytest.raises(ValueError, match="entry_points"):
            program_names(source, ["f"])


@needs_sandbox
def test_a_program_does_not_supply_what_the_tests_forgot_to_import() -> None:
    cheat = "def isclose(*values): return True\ndef f(x): return 0"
    assert run(cheat, "assert isclose(f(2), 0.5)").cause == "tests"
    assert run(cheat, "assert isclose(f(2), 0.5)", entry_points=("f",)).cause == "tests"
    assert run(cheat, "assert isclose(f(2), 0.5)", setup="from math import isclose", entry_points=("f",)).cause == "failed"


DOC = Path(__file__).resolve().parents[3] / "docs" / "rewards.md"
DOC_ROWS = re.findall(r"^\| (?:`(.*?)`)? ?\| `(.*?)` \| `(def .*?)` \| (\w+) \|$", DOC.read_text(encoding="utf-8"), re.MULTILINE)


@needs_sandbox
@pytest.mark.parametrize(("setup", "test", "program", "verdict"), DOC_ROWS)
def test_a_row_of_the_docs_on_programs(setup: str, test: str, program: str, verdict: str) -> None:
    assert len(DOC_ROWS) == 7 and run(program, test, setup=setup).status == verdict


@needs_sandbox
@pytest.mark.parametrize("data", ["b'{}[['", "b'[1]'", "b'[\"error\", \"(gone)\"]'"])
def test_a_program_that_sends_garbage_and_stays_is_ended_at_once(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = (f"import os, struct, time\ndata = {data}\nfor fd in range(3, 64):\n    try:\n"
               "        os.write(fd, struct.pack('!I', len(data)) + data)\n    except OSError: pass\ntime.sleep(60)")
    monkeypatch.setattr("reason_rl.reward.code._wait", lambda jail: pytest.fail("its exit status is waited for"))
    assert run(program, "assert f(2) == 4").cause == "crash"


@needs_sandbox
def test_all_or_nothing_unless_shares_are_asked_for() -> None:
    tests = [f"assert f({x}) == {x * x}" for x in (0, 1, 2, 3)]
    assert run("def f(x): return x", *tests).value == 0.0
    assert run("def f(x): return x", *tests, is_partial=True).value == 0.5
    assert run("def f(x): return x", *tests, is_partial=True).status == "wrong"
    assert run("import os\ndef f(x):\n    return x * x if x < 3 else os._exit(0)", *tests, is_partial=True).value == 0.75
    assert run("def f(x): return x * x", *tests, is_partial=True).value == 1.0


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
    assert run(program, test).status == "right"


@needs_sandbox
@pytest.mark.parametrize("use", [("namespaces",), ("landlock", "seccomp"), ("namespaces", "seccomp"),
                                 ("namespaces", "landlock", "seccomp")], ids="+".join)
def test_every_mixture_of_mechanisms_that_holds_grades_alike(use: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    if any(sandbox.held_mechanisms()[name] for name in use):
        pytest.skip(f"this machine has not all of {use}")
    assert sandbox.run_trial(use) == []
    monkeypatch.setattr("reason_rl.reward.code.usable_mechanisms", lambda wanted: use)
    assert run("def f(x): return x * x", "assert f(2) == 4").status == "right"
    assert run("import os\ndef f(x):\n    for _ in range(99): os.fork() or os._exit(x)", "assert f(2) is None").status == "wrong"
    assert run("import os\nos.mkdir('/new')\ndef f(x): return 4", "assert f(2) == 4").status == "wrong"
    files = "for i in range(40):\n    open(str(i), 'wb').write(bytes(1 << 20))\nimport time\ntime.sleep(0.2)\ndef f(x): return 4"
    assert run(files, "assert f(2) == 4").status == "wrong"


@pytest.mark.parametrize("use", [(), ("landlock",), ("seccomp",)])
def test_the_trial_sees_what_a_lesser_sandbox_lets_through(use: tuple[str, ...]) -> None:
    assert sandbox.run_trial(use)


ALL_HELD = {"rlimits": "", "namespaces": "", "landlock": "", "seccomp": ""}
NO_NAMESPACES = {"namespaces": "namespaces: unshare: Operation not permitted"}
NO_LANDLOCK = {"landlock": "landlock: Function not implemented"}


@pytest.mark.parametrize(("wanted", "absent", "message"), [
    ("any", NO_NAMESPACES | NO_LANDLOCK, "requires namespaces or landlock.*unshare: Operation not permitted.*not implemented"),
    ("namespaces", NO_NAMESPACES, "requires namespaces, which"), ("landlock", NO_LANDLOCK, "requires landlock, which"),
    ("all", {"seccomp": "seccomp: no"}, "requires seccomp, which"), ("any", {"rlimits": "rlimits: no"}, "requires rlimits, which"),
    ("some", {}, "reward.code_sandbox is one of any, namespaces, landlock, all, got 'some'"),
])
def test_code_is_refused_by_the_name_of_what_does_not_hold(wanted: str, absent: dict[str, str], message: str,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "held_mechanisms", lambda: ALL_HELD | absent)
    monkeypatch.setattr(sandbox, "run_trial", lambda use: [])
    monkeypatch.setattr(sandbox, "TRIED", {})
    with pytest.raises(ValueError, match=message):
        require_sandbox(wanted)
    verdict = run("def f(x): return 4", "assert f(2) == 4", sandbox=wanted)
    assert (verdict.status, verdict.cause) == ("ungradable", "sandbox") and "code_sandbox" in verdict.detail


def test_code_is_refused_when_a_trial_gets_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "held_mechanisms", lambda: ALL_HELD | {"seccomp": "seccomp: no table"})
    trials: list[tuple[str, ...]] = []
    monkeypatch.setattr(sandbox, "run_trial", lambda use: trials.append(use) or ["UDP"])
    monkeypatch.setattr(sandbox, "TRIED", {})
    for _ in range(3):  # the second time without a trial
        with pytest.raises(ValueError, match=r"landlock a trial program got through: UDP \(absent: seccomp: no table\)"):
            sandbox.usable_mechanisms("any")
    assert len(trials) == 2 and sandbox.known_mechanisms("any") == ()


@needs_sandbox
def test_what_the_trainer_has_tried_its_workers_do_not_try_again(monkeypatch: pytest.MonkeyPatch) -> None:
    options = code_options(Config().reward)
    assert options["mechanisms"] == sandbox.usable_mechanisms("any") != ()
    monkeypatch.setattr("reason_rl.reward.code.usable_mechanisms", lambda wanted: pytest.fail("tried"))
    assert run("def f(x): return 4", "assert f(2) == 4", **options).status == "right"
    monkeypatch.setattr(sandbox, "TRIED", {})
    assert code_options(Config().reward)["mechanisms"] == ()


def test_a_mechanism_that_fails_in_the_child_is_named_and_nothing_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reason_rl.reward.code.usable_mechanisms", lambda wanted: ("landlock",))
    monkeypatch.setattr(sandbox, "make_scratch", lambda: ("/no/such/folder", os.open("/", os.O_RDONLY)))
    verdict = run("def f(x): return 4", "assert f(2) == 4")
    assert (verdict.status, verdict.cause) == ("ungradable", "sandbox") and "/no/such/folder" in verdict.detail


@needs_sandbox
def test_the_command_says_what_holds_and_fails_on_a_wrong_word() -> None:
    command = [sys.executable, "-m", "reason_rl.reward.code"]
    said = subprocess.run(command, capture_output=True, text=True)
    assert said.returncode == 0 and said.stdout.startswith("code sandbox: rlimits, ")
    said = subprocess.run([*command, "none"], capture_output=True, text=True)
    assert said.returncode == 1 and "got 'none'" in said.stderr


@needs_sandbox
def test_jails_end_with_a_worker_that_is_killed() -> None:
    text = "```python\nimport signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(60)\n```"
    request = {"text": text, "facts": {"tests": ["f()"]}}
    program = f"from reason_rl.reward.code import run_code\nrun_code({request!r}, deadline_s=60)"
    worker = subprocess.Popen([sys.executable, "-c", program])
    assert until(lambda: len(jails_of(worker.pid)) == 2 and all(map(jails_of, jails_of(worker.pid))))
    keepers = jails_of(worker.pid)
    family = {*keepers, *(inside for keeper in keepers for inside in jails_of(keeper))}
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    assert len(family) == 4 and until(lambda: not any(Path(f"/proc/{pid}").exists() and not is_zombie(pid) for pid in family))
    sandbox._remove_orphans()
    assert not list(Path(sandbox.tempfile.gettempdir()).glob(f"{sandbox.SCRATCH_PREFIX}{worker.pid}_*"))


@pytest.mark.parametrize("number", [os.getpid(), 1 << 30], ids=["own", "nobody's"])
def test_a_scratch_folder_is_an_orphan_only_once_nobody_holds_its_lock(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by its owner's number: in another process namespace it is somebody else's, or nobody's."""
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
        statuses.append(run("def f(x): return x * x", "assert f(2) == 4").status)
        statuses.append(run("import os\nos._exit(0)", "assert f(2) == 4").status)

    statuses: list[str] = []
    once()
    before = len(os.listdir("/proc/self/fd")), jails_of(os.getpid())
    thread = threading.Thread(target=once)
    thread.start()
    thread.join()
    assert statuses == ["right", "wrong"] * 2
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
def test_what_is_no_plain_value_is_refused(data: Any) -> None:
    with pytest.raises((ValueError, TypeError, ArithmeticError)):
        wire.decode(data, find=lambda _: None)


def test_the_configs_limits_reach_the_code_kind() -> None:
    config = load_config(None, ["--reward.code_memory_mb=100", "--reward.code_partial=true", "--reward.code_sandbox=all"])
    options = code_options(config.reward)
    assert options["memory_bytes"] == 100 << 20 and options["is_partial"] and options["sandbox"] == "all"
    default = code_options(Config().reward)
    assert default.pop("sandbox") == "any" and default.pop("is_partial") is False
    assert default.pop("mechanisms") == sandbox.known_mechanisms("any") and sandbox.Limits(**default) == sandbox.Limits()
    with pytest.raises(ValueError, match="code_cpu_s"):
        load_config(None, ["--reward.code_cpu_s=0"])


def mbpp() -> list[dict[str, Any]]:
    folder = os.environ.get("REASON_RL_DATA")
    if not folder:
        pytest.skip("REASON_RL_DATA names no folder with mbpp/mbpp.jsonl")
    return [json.loads(line) for line in (Path(folder) / "mbpp" / "mbpp.jsonl").read_text(encoding="utf-8").splitlines()]


def request_of(row: dict[str, Any], program: str) -> dict[str, Any]:
    tests = row["test_list"] + row["challenge_test_list"]
    return {"text": f"```python\n{program}\n```", "facts": {"tests": tests, "setup": row["test_setup_code"]}}


def function_of(row: dict[str, Any]) -> str:
    """The name that the tests call; `set(...)` and `int(...)` stand around it in some."""
    calls = [node.func.id for node in ast.walk(ast.parse(row["test_list"][0]))
             if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    return next(name for name in calls if name not in ("set", "int"))


def grade_mbpp(rows: list[dict[str, Any]], every: int, every_swapped: int) -> None:
    chosen, swapped = range(0, len(rows), every), range(0, len(rows), every_swapped)
    others = [rows[(7 * i + 13) % len(rows)] for i in swapped]
    requests = [request_of(rows[i], rows[i]["code"]) for i in chosen]
    requests += [request_of(rows[i], f"{other['code']}\n{function_of(rows[i])} = {function_of(other)}")
                 for i, other in zip(swapped, others)]
    options = {"mechanisms": sandbox.usable_mechanisms(), "deadline_s": 60.0}  # more programs at once than there are processors
    kind = Kind("code", "reason_rl.reward.code:run_code", deadline_s=65.0, options=options, batch=1)
    with VerifierService([kind], num_workers=NUM_WORKERS) as service:
        verdicts = service.grade("code", requests)
    right, wrong = verdicts[: len(chosen)], verdicts[len(chosen) :]
    assert [(rows[i]["task_id"], verdict) for i, verdict in zip(chosen, right) if verdict.status != "right"] == []
    same_problem = {(677, 850), (929, 666)}  # both: do these angles make a triangle; how often does an item occur
    passed = {(rows[i]["task_id"], other["task_id"])
              for i, other, verdict in zip(swapped, others, wrong) if verdict.status != "wrong"}
    assert passed <= same_problem


@needs_sandbox
def test_gold_programs_of_mbpp_are_right_and_those_of_other_problems_wrong() -> None:
    grade_mbpp(mbpp(), every=40, every_swapped=40)


@needs_sandbox
@pytest.mark.long
def test_every_gold_program_of_mbpp_is_right_and_a_third_of_other_problems_programs_wrong() -> None:
    grade_mbpp(mbpp(), every=1, every_swapped=3)
