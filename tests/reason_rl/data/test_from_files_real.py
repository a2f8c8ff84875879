"""The real files of gsm8k, MATH and MBPP: every row is read, the splits are disjoint, gold programs pass
their tests."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from reason_rl.data import load_problems
from reason_rl.reward.code import grade_code
from reason_rl.sandbox.sandbox import SandboxError, require_sandbox
from tests.reason_rl.data.test_from_files import TOKENIZER, config_of, taken

DATA = Path(os.environ["REASON_RL_DATA"]) if os.environ.get("REASON_RL_DATA") else None
needs_data = pytest.mark.skipif(DATA is None, reason="needs REASON_RL_DATA, the folder with gsm8k/, math/ and mbpp/")


@needs_data
@pytest.mark.parametrize(("name", "folder", "num_rows", "heldout"), [
    ("gsm8k", "gsm8k", 7473, 1319), ("math", "math", 4500, None), ("code", "mbpp", 974, None)])
def test_the_real_files_are_read_whole_and_split_without_a_leak(name: str, folder: str, num_rows: int, heldout: int | None) -> None:
    assert DATA is not None
    config = config_of(DATA / folder, name, stride=16)
    problems = load_problems(config, TOKENIZER)  # parses every answer, since on_bad_row is "raise"
    twins = {"code": 1}.get(name, 0)
    assert len(problems.left_out) == twins and all("the same problem as" in row for row in problems.left_out)
    assert problems.num_train + twins + (0 if heldout else problems.num_heldout) == num_rows
    assert problems.num_heldout == heldout or abs(problems.num_heldout / num_rows - 0.05) < 0.02
    both = problems.all_known()
    assert len({p.problem_id for p in both}) == len({" ".join(p.prompt.split()) for p in both}) == len(both)
    assert all(p.answer.strip() == p.answer != "" for p in both if name != "code")
    if name == "math":
        assert Counter(p.level for p in both) == {5: 1190, 4: 1086, 3: 1026, 2: 804, 1: 394}
    if name == "code":
        assert all(len(p.facts["tests"]) >= 3 and p.prompt.count("```") == 2 for p in both)
    steps = problems.num_train // 16
    epoch = taken(config, range(steps))
    assert len(set(epoch)) == len(epoch) == 16 * steps


@needs_data
def test_gold_programs_of_the_code_task_are_right_by_its_own_facts() -> None:
    assert DATA is not None
    try:
        require_sandbox()
    except SandboxError as error:
        pytest.skip(str(error))
    for problem in load_problems(config_of(DATA / "mbpp", "code"), TOKENIZER).train(0, 4):
        assert grade_code({"text": f"<answer>{problem.answer}</answer>", "facts": problem.facts}).status == "right"
