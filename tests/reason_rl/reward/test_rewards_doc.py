"""docs/rewards.md: every row of its tables of examples holds, and its code runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from reason_rl.answers.math import grade_math
from reason_rl.config import load_config
from reason_rl.reward.custom import ARGUMENTS
from reason_rl.reward.parts import format_reward, grade_text

DOC = Path(__file__).resolve().parents[3] / "docs" / "rewards.md"
COUNTDOWN = {"numbers": [9, 8, 7], "target": 16}


def table_rows(*columns: str) -> list[tuple[str, ...]]:
    """The rows of all tables with these headings, without their code marks."""
    rows, is_wanted = [], False
    for line in DOC.read_text(encoding="utf-8").splitlines():
        if not line.startswith("|"):
            is_wanted = False
            continue
        cells = tuple(cell.strip().removeprefix("`").removesuffix("`") for cell in line.strip("|").split("|"))
        if cells == columns:
            is_wanted = True
        elif is_wanted and set(line) - set("|-"):
            rows.append(cells)
    return rows


MATH = table_rows("right answer", "completion", "verdict")
TEXT = table_rows("verifier", "right answer", "completion", "verdict")
FORMAT = table_rows("completion", "format")


def test_the_tables_are_found_whole() -> None:
    assert (len(MATH), len(TEXT), len(FORMAT)) == (92, 8, 3)
    assert {row[-1] for row in MATH} == {"right", "wrong", "ungradable"}


@pytest.mark.parametrize(("answer", "text", "verdict"), MATH, ids=[f"{a} <- {t}" for a, t, _ in MATH])
def test_a_row_on_math(answer: str, text: str, verdict: str) -> None:
    assert grade_math({"text": text, "answer": answer}).status == verdict


@pytest.mark.parametrize(("verifier", "answer", "text", "verdict"), TEXT, ids=[row[2] for row in TEXT])
def test_a_row_on_text_and_countdown(verifier: str, answer: str, text: str, verdict: str) -> None:
    request = {"text": text, "answer": answer, "facts": COUNTDOWN, "finish_reason": "stop", "verifier": verifier}
    assert grade_text(request).status == verdict


@pytest.mark.parametrize(("text", "value"), FORMAT, ids=[row[0] for row in FORMAT])
def test_a_row_on_the_format(text: str, value: str) -> None:
    assert format_reward(text, "stop") == float(value)


def test_the_page_lists_the_arguments_of_a_custom_reward() -> None:
    assert [row[0] for row in table_rows("argument", "value")] == list(ARGUMENTS)


def test_the_config_that_the_page_shows_is_one(tmp_path: Path) -> None:
    (source,) = re.findall(r"```toml\n(.*?)```", DOC.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "shown.toml").write_text(source)
    reward = load_config(tmp_path / "shown.toml").reward
    assert (reward.format, reward.overlong, reward.custom, reward.custom_weight) == (0.1, 0.5, "my_rewards:brief", 0.2)


def test_the_verifier_that_the_page_shows_works() -> None:
    (source,) = [block for block in re.findall(r"```python\n(.*?)```", DOC.read_text(encoding="utf-8"),
                                               re.DOTALL) if "grade_parity" in block]
    names: dict = {}
    exec(source, names)
    for answer, text, status in [("even", "it is even", "right"), ("odd", "it is even", "wrong"), ("odd", "odd or even", "wrong"),
                                 ("3", "odd", "ungradable")]:
        assert names["grade_parity"]({"text": text, "answer": answer}).status == status
