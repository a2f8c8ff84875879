"""docs/tasks.md: its examples are read as they stand, and its tables name what there is."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from reason_rl.config import TaskConfig, load_config
from reason_rl.data import FILE_TASKS, Tokenizer, load_dataset, load_template, problems_to_check
from reason_rl.data.difficulty import read_pass_rates
from reason_rl.data.prompts import FOLDER, KINDS
from tests.reason_rl.data.test_chat import CHATML
from tests.reason_rl.trained import folder_of

DOC = (Path(__file__).resolve().parents[3] / "docs" / "tasks.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOC, re.DOTALL)


def test_the_config_and_the_problems_that_the_page_shows_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.toml").write_text(blocks("toml")[0])
    Path("problems.jsonl").write_text(blocks("json")[0])
    config = load_config("own.toml", ["--model.init_from=somewhere"])
    dataset = load_dataset(config, Tokenizer.load(folder_of(tmp_path / "model")))
    both = {problem.answer for problem in (*dataset.rl, *dataset.heldout)}
    assert both == {"42", "\\frac{5}{3}", "x = 3, x = -3", "366"} and not dataset.left_out
    assert all(problem.prompt.endswith("Assistant: <think>") for problem in dataset.rl)
    num_heldout = max(config.eval.problems, config.eval.final_problems)
    assert len(problems_to_check(config, Tokenizer.load(tmp_path / "model"), num_heldout)) == 4  # enough for a run as it stands


def test_the_template_that_the_page_shows_is_one(tmp_path: Path) -> None:
    (tmp_path / "own_template.toml").write_text(blocks("toml")[1])
    template = load_template(str(tmp_path / "own_template.toml"))
    text = template.fill("2 + 2?", Tokenizer.load(folder_of(tmp_path / "model", chat_template=CHATML)))
    assert text.startswith("<|im_start|>system\nYou are careful.<|im_end|>\n") and text.endswith("assistant\n<think>")
    assert all(f"\n{key} = " in blocks("toml")[1] or key in ("variables", "examples") for key in KINDS)


def test_the_filter_that_the_page_shows_reads_the_rates_that_it_shows(tmp_path: Path) -> None:
    (tmp_path / "hard.toml").write_text(blocks("toml")[2])
    (tmp_path / "rates.jsonl").write_text(blocks("json")[1])
    task = load_config(tmp_path / "hard.toml").task
    assert (task.min_pass_rate, task.max_pass_rate, task.curriculum) == (0.1, 0.9, "easy_first")
    assert read_pass_rates(str(tmp_path / task.pass_rates)).counts == {2305843009213693951: (6, 8)}


def test_the_tables_name_every_task_every_template_and_the_page_every_key() -> None:
    first_cells = [line.split("|")[1].strip() for line in DOC.splitlines() if line.startswith("| `")]
    assert first_cells == [f"`{name}`" for name in (*FILE_TASKS, "plain", "r1_zero", "few_shot", "chat")]
    assert {path.stem for path in FOLDER.glob("*.toml")} == {"plain", "r1_zero", "few_shot", "chat"}
    made = {"name", "min_level", "max_level", "rl_share", "operations"}  # keys of the tasks that make their own
    assert not [field.name for field in dataclasses.fields(TaskConfig) if field.name not in made and field.name not in DOC]
