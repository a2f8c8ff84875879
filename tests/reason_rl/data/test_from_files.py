"""Problems read from files: every row is used or listed, the splits are disjoint, a step's problems depend
on its number alone."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from reason_rl.answers.ground_truth import verifier_of
from reason_rl.answers.math import grade_math
from reason_rl.config import Config, ConfigError, ModelConfig, RLConfig, RunConfig, TaskConfig, load_config
from reason_rl.data import Problems, Tokenizer, TooFewProblems, byte_tokenizer, load_problems, problems_digest
from reason_rl.data.difficulty import read_pass_rates
from reason_rl.records import Problem, SamplingParams
from reason_rl.reward import check_rewards
from tests.reason_rl.data.test_chat import CHATML
from tests.reason_rl.trained import folder_of

TOKENIZER = byte_tokenizer()


def write(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return path


def config_of(path: Path | str, name: str = "jsonl", stride: int = 4, seed: int = 0, **task: Any) -> Config:
    return Config(task=TaskConfig(name=name, path=str(path), **task), rl=RLConfig(prompts_per_step=stride),
                  run=RunConfig(seed=seed), model=ModelConfig(init_from="some/folder"))


def sums(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"prompt": f"What is {i} + 1?", "answer": i + 1} for i in range(start, start + count)]


def ids(problems: list[Problem]) -> list[int]:
    return [problem.problem_id for problem in problems]


def train_of(problems: Problems) -> list[Problem]:
    return problems.all_known()[: problems.num_train]


def heldout_of(problems: Problems) -> list[Problem]:
    return problems.all_known()[problems.num_train :]


def taken(config: Config, steps: range) -> list[int]:
    """The ids of all problems of these steps, in order."""
    problems, stride = load_problems(config, TOKENIZER), config.rl.prompts_per_step
    return [p.problem_id for step in steps for p in problems.train(step, stride)]


@pytest.fixture
def forty(tmp_path: Path) -> Path:
    """40 problems and a file of 10 held-out ones."""
    write(tmp_path / "forty" / "test.jsonl", sums(10, start=100))
    write(tmp_path / "forty" / "train.jsonl", sums(40))
    return tmp_path / "forty"


# --- rows


def test_each_tasks_rows_become_problems_with_the_answers_that_their_verifier_reads(tmp_path: Path) -> None:
    gsm8k = {"question": "How many?", "answer": "First 2.\nThen 1,080 more.\n#### 1,082"}
    math = {"problem": "Find $x$.", "solution": "It is \\boxed{1} or rather $\\boxed{\\frac{1}{2}}$.", "level": "Level 4"}
    code = {"text": "Write a function.", "code": "def f(x): return x", "test_list": ["assert f(1) == 1", "assert f(2) == 2"],
            "test_setup_code": "import math", "challenge_test_list": ["assert f(3) == 3"]}
    jsonl = {"prompt": "1 + 1?", "answer": 2, "more": None}
    shown = "Write a function.\nYour program must pass this:\n```python\nassert f(1) == 1\n```"
    facts = {"tests": ["assert f(1) == 1", "assert f(2) == 2", "assert f(3) == 3"], "setup": "import math"}
    for name, row, expected in (
        ("gsm8k", gsm8k, ("How many?", "1,082", 2, {})), ("math", math, ("Find $x$.", "\\frac{1}{2}", 4, {})),
        ("math", {"problem": "Find $x$.", "answer": " 7 "}, ("Find $x$.", "7", 0, {})),
        ("code", code, (shown, "def f(x): return x", 0, facts)), ("jsonl", jsonl, ("1 + 1?", "2", 0, {})),
    ):
        config = config_of(write(tmp_path / f"{len(str(row))}.jsonl", [row]), name, stride=1, heldout_share=0.0)
        (problem,) = train_of(load_problems(config, TOKENIZER))
        assert (problem.prompt, problem.answer, problem.level, dict(problem.facts)) == expected
        assert problem.task == name and TOKENIZER.decode(problem.prompt_ids) == problem.prompt and 0 <= problem.problem_id < 2**62
        assert check_rewards(config, problem) == [] or name == "code"
        if name != "code":
            assert grade_math({"text": f"\\boxed{{{problem.answer}}}", "answer": problem.answer}).status == "right"


BAD_ROWS = [
    ("jsonl", '{"prompt": "a?", "answer": ', "it is not valid JSON: Expecting value"),
    ("jsonl", '["a?", 1]', "it must be a JSON object, got list"),
    ("jsonl", {"question": "a?", "answer": 1}, "it has no field 'prompt'; there are question, answer"),
    ("jsonl", {"prompt": "a?"}, "it has no field 'answer'; there are prompt"),
    ("jsonl", {"prompt": ["a?"], "answer": 1}, "its 'prompt' must be text, got ['a?']"),
    ("jsonl", {"prompt": "a?", "answer": True}, "its 'answer' must be text, got True"),
    ("jsonl", {"prompt": "a?", "answer": float("nan")}, "its 'answer' must be text, got nan"),
    ("jsonl", {"prompt": "a?", "answer": float("inf")}, "its 'answer' must be text, got inf"),
    ("jsonl", {"prompt": "a\ud83d?", "answer": "1"}, "its 'prompt' is not valid text: 'utf-8' codec can't encode character"),
    ("jsonl", {"prompt": " ", "answer": 1}, "its problem is empty"),
    ("jsonl", {"prompt": "a?", "answer": ""}, "its answer is empty"),
    ("jsonl", {"prompt": "a?", "answer": "\\frac{1}{"}, "its answer '\\\\frac{1}{' cannot be read"),
    ("jsonl", {"prompt": "What is 1 + 1?", "answer": 3}, "it asks the same as {path}:2, with another answer"),
    ("gsm8k", {"question": "a?", "answer": "It is 4."}, "its answer has no ####: 'It is 4.'"),
    ("gsm8k", {"question": "a?", "answer": "#### 1/0"}, "its answer '1/0' cannot be read"),
    ("math", {"problem": "a?", "solution": "It is \\boxed{4."}, "its solution has no answer in a box"),
    ("math", {"problem": "a?"}, "it has no field 'solution'"),
    ("code", {"text": "a?", "test_list": []}, "its test_list is empty"),
    ("code", {"text": "a?", "test_list": "assert f(1)"}, "its 'test_list' must be a list of texts"),
    ("code", {"text": "a?", "test_list": ["assert f(1"]}, "its tests cannot be run: '(' was never closed"),
    ("code", {"text": "a?", "test_list": ["assert f(1) == (", "1)"]}, "its tests cannot be run: '(' was never closed"),
    ("code", {"text": "a?", "test_list": ["assert f(1)"], "entry_points": ["g"]}, "its tests cannot be run: the tests use f, wh"),
    ("code", {"text": "a?", "test_list": ["assert isclose(f(2), g(3))"]}, "its tests cannot be run: the tests use isclose, f, g"),
]
GOOD_ROWS = {"jsonl": sums(2, 1), "gsm8k": [{"question": f"{i}?", "answer": f"#### {i}"} for i in range(2)],
             "math": [{"problem": f"{i}?", "solution": f"\\boxed{{{i}}}"} for i in range(2)],
             "code": [{"text": f"{i}?", "test_list": ["assert f(1) == 1"]} for i in range(2)]}


@pytest.mark.parametrize(("name", "row", "reason"), BAD_ROWS, ids=[f"{name}: {reason}"[:60] for name, _, reason in BAD_ROWS])
def test_a_bad_row_is_one_error_with_file_and_line_or_left_out_and_listed(name: str, row: Any, reason: str, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ["", *GOOD_ROWS[name], row])
    config, expected = config_of(path, name, stride=1, heldout_share=0.0), f"{path}:4: {reason.replace('{path}', str(path))}"
    with pytest.raises(ConfigError) as caught:
        load_problems(config, TOKENIZER)
    assert str(caught.value).startswith(expected) and "task.on_bad_row" in str(caught.value)
    skipping = replace(config, task=replace(config.task, on_bad_row="skip"))
    problems = load_problems(skipping, TOKENIZER)
    assert len(train_of(problems)) == 2 and len(problems.left_out) == 1 and problems.left_out[0].startswith(expected)
    (line,) = problems.describe()
    assert "1 rows are left out" in line and expected in line


def test_invalid_bytes_are_a_bad_row_and_unicode_line_breaks_are_part_of_a_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"prompt": "a\u2028b?", "answer": 1}\r\n{"prompt": "\x85?", "answer": 2}\n'.encode()
                     + b'{"prompt": "\xff", "answer": 3}')
    with pytest.raises(ConfigError, match=r"rows\.jsonl:3: it is not valid JSON: 'utf-8' codec"):
        load_problems(config_of(path), TOKENIZER)
    problems = load_problems(config_of(path, on_bad_row="skip", heldout_share=0.0), TOKENIZER)
    assert [p.prompt for p in train_of(problems)] == ["a\u2028b?", "\x85?"]


def test_a_text_verifier_takes_any_answer_that_is_not_empty(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"prompt": "a?", "answer": "\\frac{1}{ "}])
    config = config_of(path, heldout_share=0.0)
    config = replace(config, reward=replace(config.reward, verifier="text"))
    assert train_of(load_problems(config, TOKENIZER))[0].answer == "\\frac{1}{"  # stripped


def test_the_task_chooses_the_verifier_unless_the_config_names_one() -> None:
    tasks = ("gsm8k", "math", "jsonl", "code", "countdown", "program")
    assert [verifier_of(task) for task in tasks] == ["math", "math", "math", "code", "countdown", "text"]
    assert {verifier_of(task, "text") for task in tasks} == {"text"}


def test_math_is_filtered_by_level_and_type(tmp_path: Path) -> None:
    kinds = ["Algebra", "Geometry", "Number Theory"]
    rows = [{"problem": f"{i}?", "answer": str(i), "level": f"Level {1 + i % 5}", "type": kinds[i % 3]} for i in range(60)]
    path = write(tmp_path / "rows.jsonl", [*rows, {"problem": "x?", "answer": "1", "level": "Level ?", "type": "Algebra"}])
    for more, count in (({}, 61), ({"math_levels": "2, 5"}, 24), ({"math_types": "algebra"}, 21),
                        ({"math_levels": "1", "math_types": "Number Theory,Geometry"}, 8)):
        assert len(train_of(load_problems(config_of(path, "math", heldout_share=0.0, **more), TOKENIZER))) == count


def test_the_number_of_shown_tests_is_the_configs(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"text": "a?", "test_list": [f"assert f({i}) == {i}" for i in range(3)]}])
    for count in (1, 2, 5):
        config = config_of(path, "code", stride=1, code_shown_tests=count, heldout_share=0.0)
        (problem,) = train_of(load_problems(config, TOKENIZER))
        assert problem.prompt.count("assert") == min(count, 3) and len(problem.facts["tests"]) == 3


# --- files


def test_files_are_found_under_the_tasks_own_names(forty: Path, tmp_path: Path) -> None:
    whole = load_problems(config_of(forty), TOKENIZER)
    assert (len(train_of(whole)), len(heldout_of(whole))) == (40, 10)
    named = load_problems(config_of(forty / "train.jsonl", heldout_path=str(forty / "test.jsonl")), TOKENIZER)
    assert (train_of(named), heldout_of(named)) == (train_of(whole), heldout_of(whole))
    write(tmp_path / "mbpp" / "mbpp.jsonl", GOOD_ROWS["code"])
    assert len(train_of(load_problems(config_of(tmp_path / "mbpp", "code", heldout_share=0.0), TOKENIZER))) == 2


def test_missing_problem_files_are_named(forty: Path) -> None:
    for config, message in (
        (config_of(""), "reads its problems from files: set task.path to a JSONL file, or to a folder with train.jsonl"),
        (config_of(forty / "nowhere.jsonl"), "task.path names no file: .*nowhere.jsonl"),
        (config_of(forty, heldout_path="nowhere.jsonl"), "task.heldout_path names no file: 'nowhere.jsonl'"),
        (config_of(forty / "train.jsonl", heldout_path=str(forty / "train.jsonl")), "are one file"),
        (config_of(forty.parent, "code"), "no train.jsonl or mbpp.jsonl in task.path = .*; there are forty"),
        (config_of(forty, pass_rates="nowhere.jsonl"), "task.pass_rates names no file: 'nowhere.jsonl'"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_problems(config, TOKENIZER)


# --- the split


def test_a_problem_is_never_in_both_splits_and_never_in_one_twice(tmp_path: Path) -> None:
    heldout = [*sums(5), {"prompt": "what  is 7 + 1?", "answer": 8}]
    write(tmp_path / "train.jsonl", [*sums(20), *sums(2, 18), {"prompt": "What is 15  + 1? ", "answer": 16}])
    write(tmp_path / "test.jsonl", heldout)
    problems = load_problems(config_of(tmp_path), TOKENIZER)
    assert [p.answer for p in train_of(problems)] == [str(i + 1) for i in range(20) if i not in (0, 1, 2, 3, 4, 7)]
    assert [p.answer for p in heldout_of(problems)] == ["1", "2", "3", "4", "5", "8"]
    reasons = Counter(row.partition(": ")[2].partition(f" as {tmp_path}")[0] for row in problems.left_out)
    assert reasons == {"the same problem": 3, "it is held out too": 6}


def test_the_held_out_rows_depend_on_their_text_and_not_on_the_files_order(tmp_path: Path) -> None:
    rows = sums(600)
    first = load_problems(config_of(write(tmp_path / "a.jsonl", rows), heldout_share=0.2), TOKENIZER)
    random.Random(0).shuffle(rows)
    second = load_problems(config_of(write(tmp_path / "b.jsonl", rows), heldout_share=0.2), TOKENIZER)
    assert set(ids(heldout_of(first))) == set(ids(heldout_of(second)))
    assert not set(ids(heldout_of(first))) & set(ids(train_of(first)))
    assert abs(len(heldout_of(first)) / 600 - 0.2) < 0.08  # standard deviation 0.016: five of them
    assert len(heldout_of(first)) + len(train_of(first)) == 600
    more = load_problems(config_of(tmp_path / "a.jsonl", heldout_share=0.4), TOKENIZER)
    assert set(ids(heldout_of(first))) < set(ids(heldout_of(more)))


def test_programs_of_one_text_are_in_one_split(tmp_path: Path) -> None:
    rows = [{"text": f"Task {i}.", "code": f"{j}", "test_list": [f"assert f({j}) == {j}"]} for i in range(100) for j in range(3)]
    problems = load_problems(config_of(write(tmp_path / "rows.jsonl", rows), "code", heldout_share=0.3), TOKENIZER)
    splits = [{p.prompt.partition("\n")[0] for p in split} for split in (train_of(problems), heldout_of(problems))]
    assert len(problems.all_known()) == 300 and not splits[0] & splits[1] and all(splits)


def test_the_first_heldout_problems_are_the_same_whatever_the_count_and_the_run(forty: Path) -> None:
    config = config_of(forty)
    problems = load_problems(config, TOKENIZER)
    ten = problems.heldout(10)
    assert set(ids(ten)) == set(ids(heldout_of(problems)))
    assert load_problems(config_of(forty, seed=5), TOKENIZER).heldout(4) == ten[:4] != problems.heldout(4, seed=1)
    with pytest.raises(TooFewProblems, match=r"asked for 11 held-out problems .* leave 10: ask for fewer \(eval\.problems"):
        load_problems(config, TOKENIZER).heldout(11)


# --- the order


def test_an_epoch_takes_each_problem_once_and_the_next_one_in_another_order(forty: Path) -> None:
    config = config_of(forty)
    epochs = [taken(config, range(start, start + 10)) for start in (0, 10)]
    assert all(sorted(epoch) == sorted(ids(train_of(load_problems(config, TOKENIZER)))) for epoch in epochs)
    assert epochs[0] != epochs[1] != taken(config_of(forty, seed=1), range(10)) != epochs[0]


def test_an_epoch_that_cannot_be_divided_leaves_other_problems_over_each_time(forty: Path) -> None:
    config = config_of(forty, stride=7)
    epochs = [taken(config, range(start, start + 5)) for start in (0, 5, 10)]
    assert all(len(set(epoch)) == 35 for epoch in epochs) and len({frozenset(epoch) for epoch in epochs}) == 3


def test_a_steps_problems_follow_from_seed_step_and_round_alone(forty: Path) -> None:
    config = config_of(forty)
    first = load_problems(config, TOKENIZER).train(7, 4)
    random.seed(0)  # no global generator takes part
    again = load_problems(config, byte_tokenizer())  # and no state: this object has not drawn before
    assert again.train(7, 4) == first and again.train(7, 2) == first[:2]


def test_a_file_that_changes_later_does_not_change_the_problems(forty: Path) -> None:
    problems = load_problems(config_of(forty), TOKENIZER)
    first, digest = problems.train(0, 4), problems.digest
    write(forty / "train.jsonl", sums(20))
    assert problems.train(0, 4) == first and problems.num_train == 40
    assert load_problems(config_of(forty), TOKENIZER).digest != digest


def test_refills_are_other_problems_until_there_are_none_left(forty: Path) -> None:
    problems = load_problems(config_of(forty), TOKENIZER)
    had: list[int] = []
    for round_number in range(10):
        had += ids(problems.train(3, 4, round_number, exclude=had))
    assert len(set(had)) == 40
    with pytest.raises(TooFewProblems, match=r"asked for 1 train problems .* 40 of them are excluded"):
        problems.train(3, 1, 10, exclude=had)
    first, second = (ids(problems.train(3, 4, round_number)) for round_number in (1, 2))
    assert first != second and len(set(first)) == 4
    with pytest.raises(TooFewProblems, match=r"asked for 41 train problems .* ask for fewer \(rl\.prompts_per_step\)"):
        load_problems(config_of(forty, stride=41), TOKENIZER).train(0, 41)


# --- lengths


def test_a_prompt_that_does_not_fit_is_an_error_unless_longer_ones_are_left_out(forty: Path) -> None:
    long = {"prompt": "Long? " * 30, "answer": 1}
    write(forty / "train.jsonl", [*sums(40), long])
    context = ModelConfig(init_from="x", max_position_embeddings=100)
    config = replace(config_of(forty, seed=1), model=context, sampling=SamplingParams(max_tokens=20))
    problems = load_problems(config, TOKENIZER)
    assert long["prompt"] not in {p.prompt for p in problems.train(0, 4)}  # the first step is not enough
    with pytest.raises(ValueError, match=r"180 tokens, but .* = 100 less .* leaves 80; task\.max_prompt_tokens"):
        problems.check(problems.to_check(4, 10), config)
    config = replace(config, task=replace(config.task, max_prompt_tokens=80))
    problems = load_problems(config, TOKENIZER)
    problems.check(problems.to_check(4, 10), config)
    assert len(train_of(problems)) == 40
    assert problems.left_out == (f"{forty}/train.jsonl:41: its prompt has 180 tokens, task.max_prompt_tokens is 80",)


# --- difficulty


def rated(forty: Path, rates: dict[int, tuple[int, int]], **task: Any) -> Problems:
    """The forty problems with pass rates (right, samples), by their index."""
    plain = train_of(load_problems(config_of(forty), TOKENIZER))
    rows = [{"problem_id": plain[i].problem_id, "num_right": right, "num_samples": samples, "pass_rate": right / samples}
            for i, (right, samples) in rates.items()]
    path = write(forty / f"rates{len(list(forty.iterdir()))}.jsonl", rows)
    return load_problems(config_of(forty, pass_rates=str(path), **task), TOKENIZER)


def test_pass_rates_filter_train_problems_and_no_held_out_ones(forty: Path) -> None:
    plain = load_problems(config_of(forty), TOKENIZER)
    rates = {i: (i % 5, 4) for i in range(40)}
    limited = rated(forty, rates, min_pass_rate=0.25, max_pass_rate=0.75)
    assert train_of(limited) == [p for i, p in enumerate(train_of(plain)) if i % 5 in (1, 2, 3)]
    assert heldout_of(limited) == heldout_of(plain)
    assert "16 outside of the pass rates asked for" in limited.describe()[0]
    assert train_of(rated(forty, rates)) == train_of(plain)


def test_pass_rates_are_found_by_id_or_prompt_and_rows_of_one_problem_add_up(forty: Path) -> None:
    rows = [{"prompt": p["prompt"], "num_right": 1, "num_samples": 2} for p in sums(40)]
    path = write(forty / "rates.jsonl", [*rows, *[{**row, "num_right": 0} for row in rows[:10]]])
    problems = load_problems(config_of(forty, pass_rates=str(path), min_pass_rate=0.25, max_pass_rate=0.4), TOKENIZER)
    assert [p.prompt for p in train_of(problems)] == [p["prompt"] for p in sums(10)]


def test_a_pass_rate_is_of_the_samples_that_could_be_graded(forty: Path) -> None:
    """A prompt may also hold a character that Unicode treats as a line break."""
    rows = [{"problem_id": 1, "num_right": 2, "num_samples": 4, "num_graded": 2},
            {"prompt": "a\u2028b", "num_right": 1, "num_samples": 4},
            {"problem_id": 2, "num_right": 0, "num_samples": 4, "num_graded": 0}]
    path = forty / "rates.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    assert read_pass_rates(str(path)).counts == {1: (2, 2), "a\u2028b": (1, 4)}


def test_a_problem_without_a_pass_rate_is_a_bad_row(forty: Path) -> None:
    rates = dict.fromkeys(range(39), (1, 2))
    with pytest.raises(ConfigError, match=r"train\.jsonl:40: .* has no pass rate of problem \d+"):
        rated(forty, rates)
    problems = rated(forty, rates, on_bad_row="skip")
    assert len(train_of(problems)) == 39 and len(problems.left_out) == 1


@pytest.mark.parametrize("row", ["{", "[]", {"problem_id": 1, "num_right": 3, "num_samples": 2}, {"problem_id": 1, "num_right": 0},
                                 {"num_right": 0, "num_samples": 2}, {"prompt": "x", "num_right": 0, "num_samples": 0},
                                 {"problem_id": 1.5, "num_right": 0, "num_samples": 2}], ids=str)
def test_a_bad_row_of_pass_rates_is_named(row: Any, forty: Path) -> None:
    path = write(forty / "rates.jsonl", [{"problem_id": 1, "num_right": 1, "num_samples": 2}, row])
    with pytest.raises(ConfigError, match=r"rates\.jsonl:2: "):
        load_problems(config_of(forty, pass_rates=str(path)), TOKENIZER)


def test_the_curriculum_goes_from_easy_to_hard_in_every_epoch(forty: Path) -> None:
    rates = {i: ((7 * i) % 41, 40) for i in range(40)}
    rated(forty, rates, curriculum="easy_first")
    (path,) = forty.glob("rates*")
    config = config_of(forty, pass_rates=str(path), curriculum="easy_first")
    rate_of = {p.problem_id: rates[i][0] / 40 for i, p in enumerate(train_of(load_problems(config_of(forty), TOKENIZER)))}
    epochs = [taken(config, range(start, start + 10)) for start in (0, 10)]
    for epoch in epochs:
        bands = [min(9, int(rate_of[p] * 10)) for p in epoch]
        assert bands == sorted(bands, reverse=True) and len(set(bands)) == 10 and len(set(epoch)) == 40
    assert epochs[0] != epochs[1]  # shuffled within a band
    easy, hard = (load_problems(config, TOKENIZER).train(step, 4, 1) for step in (0, 9))
    assert min(rate_of[p.problem_id] for p in easy) > max(rate_of[p.problem_id] for p in hard)
    uneven = config_of(forty, stride=7, pass_rates=str(path), curriculum="easy_first")
    left_over = [set(rate_of) - set(taken(uneven, range(start, start + 5))) for start in range(0, 50, 5)]
    assert len(set.union(*left_over)) > 20  # not always the hardest


@pytest.mark.parametrize("more", [{"curriculum": "easy_first"}, {"min_pass_rate": 0.1}, {"max_pass_rate": 0.9}], ids=str)
def test_keys_that_need_pass_rates_need_their_file(more: dict[str, Any], forty: Path) -> None:
    with pytest.raises(ConfigError, match=r"name their file in task\.pass_rates"):
        load_problems(config_of(forty, **more), TOKENIZER)
    with pytest.raises(ConfigError, match=f"task 'program' generates its problems; task.{next(iter(more))} is for gsm8k"):
        load_problems(Config(task=TaskConfig(**more)), TOKENIZER).train(0, 4)


def test_limits_that_leave_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"task\.min_pass_rate = 0\.9 is above task\.max_pass_rate = 0\.1"):
        load_config(None, ["--task.min_pass_rate=0.9", "--task.max_pass_rate=0.1"])


def test_the_digest_depends_on_tests_that_the_prompt_does_not_show() -> None:
    one = Problem(1, "code", "f?", (1, 2), "", {"tests": ["assert f(1) == 1"]})
    assert problems_digest([one]) == problems_digest([replace(one)])
    assert problems_digest([one]) != problems_digest([replace(one, facts={"tests": ["assert f(1) == 2"]})])


def test_an_unused_chat_template_is_mentioned(forty: Path, tmp_path: Path) -> None:
    chatting = Tokenizer.load(folder_of(tmp_path / "model", chat_template=CHATML))
    num_lines = {(tokenizer is chatting, template): len(load_problems(config_of(forty, template=template), tokenizer).describe())
            for tokenizer, template in ((TOKENIZER, "plain"), (chatting, "plain"), (chatting, "chat"))}
    assert num_lines == {(False, "plain"): 1, (True, "plain"): 2, (True, "chat"): 1}
