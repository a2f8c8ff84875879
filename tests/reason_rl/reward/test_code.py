"""The code reward: programs that solve their tests are right, and each failure of a program is wrong and named."""

from __future__ import annotations

import ast
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from reason_rl.config import Config, load_config
from reason_rl.reward.code import code_options, extract_code, grade_code
from reason_rl.reward.pool.service import Kind, VerifierService
from reason_rl.sandbox import sandbox

MUST_HAVE_SANDBOX = bool(os.environ.get("REASON_RL_REQUIRE_SANDBOX"))
NUM_WORKERS = 3 * (os.cpu_count() or 2)
"""A jail's start is half waiting, for the kernel to make and take down its namespaces."""
QUICK = {"deadline_s": 5.0, "cpu_s": 3, "memory_bytes": 256 << 20}


@pytest.fixture
def sandboxed() -> None:
    try:
        sandbox.require_sandbox()
    except sandbox.SandboxError as error:
        if MUST_HAVE_SANDBOX:
            raise
        pytest.skip(str(error))


def run(program: str, *tests: str, setup: str = "", entry_points: tuple[str, ...] = (), **options: Any) -> Any:
    facts = {"tests": tests, "setup": setup, "entry_points": entry_points}
    request = {"text": f"```python\n{program}\n```", "facts": facts}
    return grade_code(request, **{**QUICK, **options})



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
def test_a_text_without_a_program_has_none(text: str) -> None:
    assert extract_code(text) is None


@needs_sandbox
@pytest.mark.parametrize(("program", "cause"), [
    ("def f(x): return x", "failed"), ("def g(x): return x", "raised"), ("def f(x): raise KeyError", "raised"),
    ("def f(", "raised"),
    ("import os\ndef f(x): os._exit(0)", "crash"), ("import ctypes\nctypes.string_at(0)", "crash"),
    ("def f(x): return bytearray(1 << 30)", "memory"), ("def f(x):\n    while True: pass", "deadline"),
    ("import time\ntime.sleep(60)", "deadline"), ("while True: print('x' * 1000)", "output"),
])
def test_a_failure_that_the_program_causes_is_wrong_and_named(program: str, cause: str) -> None:
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
def test_all_or_nothing_unless_shares_are_asked_for() -> None:
    tests = [f"assert f({x}) == {x * x}" for x in (0, 1, 2, 3)]
    assert run("def f(x): return x", *tests).value == 0.0
    assert run("def f(x): return x", *tests, is_partial=True).value == 0.5
    assert run("def f(x): return x", *tests, is_partial=True).status == "wrong"
    assert run("import os\ndef f(x):\n    return x * x if x < 3 else os._exit(0)", *tests, is_partial=True).value == 0.75
    assert run("def f(x): return x * x", *tests, is_partial=True).value == 1.0


@pytest.mark.parametrize("program", ["", "def f(x): return 4"])
def test_code_is_not_run_where_the_sandbox_does_not_hold(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(wanted: str) -> None:
        raise sandbox.SandboxError("no namespaces here")

    monkeypatch.setattr("reason_rl.reward.code.usable_mechanisms", refuse)
    monkeypatch.setattr("reason_rl.reward.code.run_exam", lambda *given: pytest.fail("it is run"))
    verdict = run(program, "assert f(2) == 4", sandbox="all")
    assert (verdict.status, verdict.cause) == ("ungradable", "sandbox")
    assert verdict.detail == "reward.code_sandbox = 'all': no namespaces here"


@needs_sandbox
def test_what_the_trainer_has_tried_its_workers_do_not_try_again(monkeypatch: pytest.MonkeyPatch) -> None:
    options = code_options(Config().reward)
    assert options["mechanisms"] == sandbox.usable_mechanisms("any") != ()
    monkeypatch.setattr("reason_rl.reward.code.usable_mechanisms", lambda wanted: pytest.fail("tried"))
    assert run("def f(x): return 4", "assert f(2) == 4", **options).status == "right"
    monkeypatch.setattr(sandbox, "TRIED", {})
    assert code_options(Config().reward)["mechanisms"] == ()


def test_a_mechanism_that_fails_in_the_child_is_ungradable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "make_scratch", lambda: ("/no/such/folder", os.open("/", os.O_RDONLY)))
    verdict = run("def f(x): return 4", "assert f(2) == 4", mechanisms=("landlock",))
    assert (verdict.status, verdict.cause) == ("ungradable", "sandbox") and "/no/such/folder" in verdict.detail


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
    """The name that the tests call; some wrap it in `set(...)` or `int(...)`."""
    calls = [node.func.id for node in ast.walk(ast.parse(row["test_list"][0]))
             if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    return next(name for name in calls if name not in ("set", "int"))


def grade_mbpp(rows: list[dict[str, Any]], every: int, every_swapped: int) -> None:
    chosen, swapped = range(0, len(rows), every), range(0, len(rows), every_swapped)
    others = [rows[(7 * i + 13) % len(rows)] for i in swapped]
    requests = [request_of(rows[i], rows[i]["code"]) for i in chosen]
    requests += [request_of(rows[i], f"{other['code']}\n{function_of(rows[i])} = {function_of(other)}")
                 for i, other in zip(swapped, others)]
    # More programs at once than processors, and slow ones: the slowest takes 4.8 s on one cloud CPU.
    options = {"mechanisms": sandbox.usable_mechanisms(), "deadline_s": 60.0, "cpu_s": 30}
    kind = Kind("code", grade_code, deadline_s=65.0, options=options, batch=1)
    with VerifierService([kind], num_workers=NUM_WORKERS) as service:
        verdicts = service.grade("code", requests)
    right, wrong = verdicts[: len(chosen)], verdicts[len(chosen) :]
    assert [(rows[i]["task_id"], verdict) for i, verdict in zip(chosen, right) if verdict.status != "right"] == []
    same_problem = {(677, 850), (929, 666)}  # the same problem twice: angles of a triangle; count of an item
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
