"""Hostile completions, each with the verdict it must get, through the verifier service as a run uses it.

None may score, run past its deadline or harm its surroundings. `make test` runs a tenth of each table,
`make test-long` all. The honest completions of each case must be right, so that a grader which returns "wrong" for
everything fails too.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from reason_rl.answers.math import grade_math
from reason_rl.answers.verdict import Verdict
from reason_rl.reward.code import extract_code, grade_code
from reason_rl.reward.parts import grade_text
from reason_rl.reward.pool.service import Kind, VerifierService
from reason_rl.sandbox.sandbox import SandboxError, known_mechanisms, require_sandbox
from tests.reason_rl.reward.attacks.tables import HERE, TABLES, Attack, load
from tests.reason_rl.reward.attacks.world import ROOT, World

CODE_LIMITS = {"deadline_s": 8.0, "cpu_s": 2, "memory_bytes": 256 << 20}
NUM_WORKERS = 3 * (os.cpu_count() or 2)
"""Of the code kind: jails start slowly and programs sleep, all of it waiting. Hence a deadline well above the processor time."""
WAIT_S = 300.0
"""For a table's last verdict: a grader that hangs past its own deadline fails here."""
MUST_HAVE_SANDBOX = bool(os.environ.get("REASON_RL_REQUIRE_SANDBOX"))


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.close()


def need_sandbox() -> None:
    """Skips on a machine whose sandbox does not hold; fails there if the variable is set, as in CI."""
    try:
        require_sandbox()
    except SandboxError as error:
        if MUST_HAVE_SANDBOX:
            raise
        pytest.skip(str(error))


def kinds() -> list[Kind]:
    return [
        Kind("math", grade_math, deadline_s=5.0, memory_bytes=1 << 30),
        Kind("text", grade_text, deadline_s=5.0, memory_bytes=1 << 30),
        Kind("code", grade_code, deadline_s=CODE_LIMITS["deadline_s"] + 5, num_workers=NUM_WORKERS, batch=1,
             options=CODE_LIMITS | {"mechanisms": known_mechanisms("any")}),
    ]


def grade(attacks: list[Attack]) -> list[tuple[Attack, Verdict]]:
    with VerifierService(kinds(), num_workers=2) as service:
        futures = [service.submit(*request_of(attack)) for attack in attacks]
        verdicts = [future.result(timeout=WAIT_S) for future in futures]
    return [(attack, judged(attack, verdict)) for attack, verdict in zip(attacks, verdicts)]


def request_of(attack: Attack) -> tuple[str, dict[str, Any]]:
    case = attack.case
    kind = case["task"] if case["task"] in ("math", "code") else "text"
    return kind, {"task": case["task"], "prompt": case["prompt"], "answer": case["answer"], "facts": case.get("facts", {}),
                  "text": attack.text, "finish_reason": "stop", "verifier": "countdown" if case["task"] == "countdown" else "text"}


def judged(attack: Attack, verdict: Verdict) -> Verdict:
    """For the format table the format part decides."""
    if attack.case["task"] != "format":
        return verdict
    assert verdict.is_graded
    return Verdict("right" if verdict.parts["format"] > 0 else "wrong", value=verdict.parts["format"])


def amiss(graded: list[tuple[Attack, Verdict]]) -> list[str]:
    return [f"{attack.name}: must be {attack.verdict} {attack.cause}, is {verdict}: {attack.text[:200]!r}"
            for attack, verdict in graded if verdict.status != attack.verdict or (attack.cause and verdict.cause != attack.cause)
            or (verdict.value == 1.0) != (attack.verdict == "right")]


def chosen(table: str, world: World, every: int) -> list[Attack]:
    if table.startswith("code"):
        need_sandbox()
    attacks = load(table, **world.places())
    honest = [attack for attack in attacks if attack.verdict == "right"]
    return honest + [attack for attack in attacks if attack.verdict != "right"][::every]


@pytest.mark.parametrize("table", TABLES)
def test_a_tenth_of_the_attacks_gets_the_verdict_it_must_and_harms_nothing(table: str, world: World) -> None:
    assert not amiss(grade(chosen(table, world, every=10)))
    assert not world.harm()


@pytest.mark.long
@pytest.mark.parametrize("table", TABLES)
def test_every_attack_gets_the_verdict_it_must_and_harms_nothing(table: str, world: World) -> None:
    assert not amiss(grade(chosen(table, world, every=1)))
    assert not world.harm()


@pytest.mark.long
@pytest.mark.parametrize("use", [("namespaces",), ("landlock", "seccomp")], ids="+".join)
@pytest.mark.parametrize("table", ["code_cheat", "code_escape"])
def test_either_half_of_the_sandbox_holds_alone(table: str, use: tuple[str, ...], world: World,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reason_rl.reward.code.usable_mechanisms", lambda wanted: use)
    attacks = chosen(table, world, every=1)
    with ThreadPoolExecutor(NUM_WORKERS) as pool:
        verdicts = pool.map(lambda attack: grade_code(request_of(attack)[1], **CODE_LIMITS), attacks)
    assert not amiss(list(zip(attacks, verdicts)))
    assert not world.harm()


@pytest.mark.parametrize(("must_have", "outcome"), [(True, SandboxError), (False, pytest.skip.Exception)])
def test_without_a_sandbox_the_attacks_on_code_fail_in_ci_and_are_skipped_elsewhere(
        must_have: bool, outcome: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> str:
        raise SandboxError("no namespaces here")

    monkeypatch.setattr("tests.reason_rl.reward.attacks.test_attacks.require_sandbox", refuse)
    monkeypatch.setattr("tests.reason_rl.reward.attacks.test_attacks.MUST_HAVE_SANDBOX", must_have)
    with pytest.raises(outcome, match="no namespaces here"):
        need_sandbox()


def test_there_are_three_hundred_attacks_and_more_of_every_kind() -> None:
    tables = {table: [attack for attack in load(table) if attack.verdict != "right"] for table in TABLES}
    assert sum(map(len, tables.values())) >= 300
    assert min(map(len, tables.values())) >= 30
    for table, attacks in tables.items():
        names = [attack.name for attack in attacks if attack.case is attacks[0].case]
        assert len(names) == len(set(names)), f"{table}: two attacks of one name"


def test_the_files_that_attacks_name_in_the_repository_exist() -> None:
    """An attack on a missing file would test nothing."""
    named = {name for table in TABLES for name in re.findall(r"@repo@/([\w/.]+)", (HERE / f"{table}.toml").read_text("utf-8"))}
    assert named and [name for name in named if not (ROOT / name).is_file()] == []


def test_programs_that_escape_are_programs() -> None:
    """A syntax error would be graded wrong too, and test nothing."""
    for attack in [*load("code_escape", parent=1, port=1), *load("code_exhaust")]:
        if not attack.name.startswith("source "):
            program = extract_code(attack.text)
            assert program is not None and ast.parse(program)


@pytest.mark.parametrize(("name", "sign"), [
    ("write to a file", "content"), ("make a file in its folder", "files outside"), ("change times", "files outside"),
    ("remove the folder", "content"), ("TCP to the parent", "TCP"), ("UDP to the parent", "UDP"),
    ("processors of the parent", "priority"), ("subprocess", "is left"),
])
def test_the_harm_of_an_attack_without_a_sandbox_is_detected(
        name: str, sign: str, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that `harm` above is known to detect harm. Each of these attacks is harmless."""
    monkeypatch.setattr("tests.reason_rl.reward.attacks.world.GRACE_S", 0.5)
    (attack,) = [attack for attack in load("code_escape", **world.places()) if attack.name == name]
    affinity, policy = os.sched_getaffinity(0), os.sched_getscheduler(0)
    try:
        subprocess.run([sys.executable, "-c", extract_code(attack.text) or ""], check=True, stdout=subprocess.DEVNULL)
        assert any(sign in line for line in world.harm())
    finally:
        os.sched_setscheduler(0, policy, os.sched_param(0))
        os.sched_setaffinity(0, affinity)
