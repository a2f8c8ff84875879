"""docs/tasks.md: its examples run unchanged, and its tables are complete."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path

import pytest

from reason_rl.config import TaskConfig, load_config, parse_command_line
from reason_rl.data import FILE_TASKS, Tokenizer, char_tokenizer, corpus_documents, load_problems, load_template
from reason_rl.data.difficulty import read_pass_rates
from reason_rl.data.prompts import FOLDER, KINDS
from tests.reason_rl.data.test_chat import CHATML
from tests.reason_rl.trained import folder_of

DOC = (Path(__file__).resolve().parents[3] / "docs" / "tasks.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOC, re.DOTALL)


def test_a_run_can_start_from_the_config_and_the_problems_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.toml").write_text(blocks("toml")[0])
    Path("problems.jsonl").write_text(blocks("json")[0])
    config = load_config("own.toml", ["--model.init_from=somewhere"])
    problems = load_problems(config, Tokenizer.load(folder_of(tmp_path / "model")))
    known = problems.all_known()
    assert {problem.answer for problem in known} == {"42", "\\frac{5}{3}", "x = 3, x = -3", "366"} and not problems.left_out
    assert all(problem.prompt.endswith("Assistant: <think>") for problem in known)
    # Enough for the first step and the evaluation.
    assert problems.to_check(config.rl.prompts_per_step, max(config.eval.problems, config.eval.final_problems)) == known


def test_the_task_class_of_the_page_generates_problems_and_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_tasks", raising=False)
    (source,) = blocks("python")
    Path("my_tasks.py").write_text(source)
    (command,) = re.findall(r"train\.py (.*)", source)
    config = parse_command_line(command.split())
    problems = load_problems(config, char_tokenizer()).train(0, 16)
    assert all(problem.answer == problem.prompt[-2::-1] for problem in problems)
    documents = [char_tokenizer().decode(document.token_ids) for document in corpus_documents(config, char_tokenizer(), 0, 100)]
    worked = re.compile(r"(.)(.)(.)\?<think>\3,\2,\1</think><answer>\3\2\1</answer><eos>")
    assert any(worked.fullmatch(document) for document in documents)


def test_the_template_of_the_page_is_valid(tmp_path: Path) -> None:
    (tmp_path / "own_template.toml").write_text(blocks("toml")[1])
    template = load_template(str(tmp_path / "own_template.toml"))
    text = template.fill("2 + 2?", Tokenizer.load(folder_of(tmp_path / "model", chat_template=CHATML)))
    assert text.startswith("<|im_start|>system\nYou are careful.<|im_end|>\n") and text.endswith("assistant\n<think>")
    assert all(f"\n{key} = " in blocks("toml")[1] or key in ("variables", "examples") for key in KINDS)


def test_the_filter_of_the_page_reads_its_pass_rates(tmp_path: Path) -> None:
    (tmp_path / "hard.toml").write_text(blocks("toml")[2])
    (tmp_path / "rates.jsonl").write_text(blocks("json")[1])
    task = load_config(tmp_path / "hard.toml").task
    assert (task.min_pass_rate, task.max_pass_rate, task.curriculum) == (0.1, 0.9, "easy_first")
    assert read_pass_rates(str(tmp_path / task.pass_rates)).counts == {2305843009213693951: (6, 8)}


def test_the_page_names_every_file_task_every_template_and_every_key() -> None:
    first_cells = [line.split("|")[1].strip() for line in DOC.splitlines() if line.startswith("| `")]
    assert first_cells == [f"`{name}`" for name in (*FILE_TASKS, "plain", "r1_zero", "few_shot", "chat")]
    assert {path.stem for path in FOLDER.glob("*.toml")} == {"plain", "r1_zero", "few_shot", "chat"}
    keys = {field.name for field in dataclasses.fields(TaskConfig)} - {"operations"}  # of countdown alone
    assert not [key for key in keys if key not in DOC]
