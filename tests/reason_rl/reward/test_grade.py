"""Rewards: right answers pay, tricks do not, and a reward that fails never ends the run."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from reason_rl.config import Config, ConfigError, RewardConfig
from reason_rl.records import Problem, SamplingParams
from reason_rl.reward import check_rewards
from reason_rl.reward.custom import ARGUMENTS
from reason_rl.reward.grade import reward_kinds
from reason_rl.reward.pool.service import VerifierService
from tests.reason_rl.reward.texts import Texts, grade, make_grader

PROGRAM = Problem(problem_id=1, task="program", prompt="a2,b*3,c-1?", prompt_ids=(1, 2), answer="5", level=3)
COUNTDOWN = Problem(problem_id=2, task="countdown", prompt="a9b8c7=16?", prompt_ids=(1, 2), answer="(9-7)*8",
                    facts={"numbers": [9, 8, 7], "target": 16}, level=3)
RIGHT = "<think>a2,b*3=6,c-1=5</think><answer>5</answer>"


def test_countdown_is_graded_by_value_and_programs_by_text() -> None:
    for answer in ("(9-7)*8", "8*(9-7)"):
        text = f"<think></think><answer>{answer}</answer>"
        assert grade(COUNTDOWN, text, Config()).parts["accuracy"] == 1.0
    assert grade(COUNTDOWN, "<think></think><answer>16</answer>", Config()).parts["accuracy"] == 0.0
    for answer, value in (("5", 1.0), (" 5 ", 1.0), ("05", 0.0), ("6", 0.0), ("", 0.0), ("55", 0.0)):
        text = f"<think></think><answer>{answer}</answer>"
        assert grade(PROGRAM, text, Config()).parts["accuracy"] == value


def test_the_value_is_the_weighted_sum_of_the_parts() -> None:
    config = Config(reward=RewardConfig(accuracy=2.0, format=0.25, overlong=0.5, overlong_buffer=10),
                    sampling=SamplingParams(max_tokens=20))
    score = grade(PROGRAM, RIGHT, config, num_tokens=15)
    assert score.parts == {"accuracy": 1.0, "format": 1.0, "overlong": -0.5}
    assert score.value == 2.0 + 0.25 - 0.25
    assert score.is_graded and not score.cause


def test_every_part_that_has_a_weight_is_logged_and_counts() -> None:
    reward = RewardConfig(custom="bench.rewards:distinct_characters", custom_weight=0.125,
                          judge="bench.rewards:distinct_characters", judge_weight=-0.25)
    score = grade(PROGRAM, RIGHT, Config(reward=reward))
    assert score.parts.keys() == {"accuracy", "format", "overlong", "custom", "judge"}
    assert score.parts["custom"] == score.parts["judge"] == len(set(RIGHT))
    assert score.value == pytest.approx(1 + 0.1 - 0.125 * len(set(RIGHT)), abs=1e-12)


def test_accuracy_format_and_overlong_are_logged_without_a_weight() -> None:
    score = grade(PROGRAM, RIGHT, Config(), finish_reason="length")
    assert score.parts["overlong"] == -1.0 and score.value == 1.0


def test_a_right_answer_out_of_format_still_counts_as_right() -> None:
    score = grade(PROGRAM, "so <answer>5</answer>", Config())
    assert score.parts == {"accuracy": 1.0, "format": 0.0, "overlong": 0.0} and score.value == 1.0


def test_the_task_chooses_the_accuracy_verifier_unless_the_config_does() -> None:
    text = "<think></think><answer>5.0</answer>"
    assert grade(PROGRAM, text, Config()).parts["accuracy"] == 0.0
    assert grade(PROGRAM, text, Config(reward=RewardConfig(verifier="math"))).parts["accuracy"] == 1.0
    score = grade(replace(PROGRAM, task="gsm8k"), text, Config())
    assert score.parts == {"accuracy": 1.0, "format": 1.0, "overlong": 0.0}


USERS = """
import os, time
def fails(problem, text): raise KeyError("no such column")
def nan(problem, text): return float("nan")
def infinite(problem, text): return float("inf")
def none(problem, text): return None
def one_argument(problem): return problem.level
def everything(problem, text, num_tokens, max_tokens, finish_reason, unasked=1000):
    return num_tokens + 100 * max_tokens + unasked * (finish_reason == "length")
def any_names(**given): return len(given)
def other_names(p, completion): return 1.0
def by_position(text, /): return 1.0
def word(problem, text): return "good"
def deep(problem, text): return deep(problem, text)
def leaves(problem, text): raise SystemExit(0)
def gone(problem, text): os._exit(0)
def hangs(problem, text): time.sleep(60)
def picky(problem, text): return 1.0 / len(text)
def short(problem, text): return -len(text)
number = 3
"""


@pytest.fixture
def users_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "users_reward.py").write_text(USERS)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setitem(sys.modules, "users_reward", None)
    del sys.modules["users_reward"]
    monkeypatch.chdir(tmp_path)
    return "users_reward"


@pytest.mark.parametrize(("function", "cause"), [
    ("fails", "custom raised: KeyError: 'no such column'"), ("nan", "custom not_finite: returned nan"),
    ("infinite", "custom not_finite: returned inf"), ("none", "custom raised: TypeError"),
    ("other_names", "custom start: CustomRewardError"), ("word", "custom raised: ValueError"),
    ("deep", "custom raised: RecursionError"), ("leaves", "custom raised: SystemExit"), ("gone", "custom crash: the worker died"),
    ("hangs", "custom deadline: no verdict within 0.3 s"),
])
def test_a_reward_that_fails_leaves_the_completion_ungraded(function: str, cause: str, users_module: str) -> None:
    config = Config(reward=RewardConfig(custom=f"{users_module}:{function}", custom_deadline_s=0.3))
    score = grade(PROGRAM, RIGHT, config)
    assert not score.is_graded and score.value == 0.0
    assert score.cause.startswith(cause)
    assert score.parts["accuracy"] == 1.0


def test_a_slow_import_does_not_count_for_a_completions_deadline(users_module: str) -> None:
    Path("slow_reward.py").write_text("import time\ntime.sleep(1.0)\ndef one(problem, text): return 1.0\n")
    score = grade(PROGRAM, RIGHT, Config(reward=RewardConfig(custom="slow_reward:one", custom_deadline_s=0.3)))
    assert score.is_graded and score.parts["custom"] == 1.0


@pytest.mark.parametrize(("verifier", "facts", "message"), [
    ("countdown", {}, "'countdown' needs numbers and target .* the task 'program' has none"),
    ("countdown", {"numbers": [1]}, r"needs target .* has \['numbers'\]"),
    ("code", {}, "'code' needs tests"), ("code", {"tests": []}, "'code' needs tests"),
])
def test_a_verifier_whose_facts_the_task_lacks_is_refused_before_work_starts(verifier: str, facts: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_rewards(Config(reward=RewardConfig(verifier=verifier)), replace(PROGRAM, facts=facts))
    assert check_rewards(Config(), COUNTDOWN) == []


def test_one_failing_completion_leaves_the_others_graded(users_module: str) -> None:
    texts = Texts()
    with make_grader(Config(reward=RewardConfig(custom=f"{users_module}:picky")), texts) as grader:
        pending = [grader.submit(PROGRAM, texts.completion(text)) for text in (RIGHT, "", RIGHT)]
        assert [one.score().is_graded for one in pending] == [True, False, True]
        assert all(one.is_done for one in pending)


def test_a_custom_reward_gets_the_arguments_that_it_names(users_module: str) -> None:
    def custom(function: str, **completion: Any) -> float:
        reward = RewardConfig(custom=f"{users_module}:{function}")
        config = Config(reward=reward, sampling=SamplingParams(max_tokens=20))
        return grade(PROGRAM, RIGHT, config, **completion).parts["custom"]

    assert custom("one_argument") == PROGRAM.level
    assert custom("everything", num_tokens=7) == 2007
    assert custom("everything", num_tokens=20, finish_reason="length") == 3020
    assert custom("any_names") == len(ARGUMENTS)


@pytest.mark.parametrize(("function", "names"), [("other_names", "p, completion"), ("by_position", "text")])
def test_a_custom_reward_of_other_arguments_is_refused_before_work_starts(function: str, names: str, users_module: str) -> None:
    config = Config(reward=RewardConfig(custom=f"{users_module}:{function}"))
    with pytest.raises(ConfigError, match=f"a reward takes any of {', '.join(ARGUMENTS)} by name, got {names}"):
        check_rewards(config, PROGRAM)


def test_a_bug_in_a_users_module_keeps_its_own_class_and_traceback(users_module: str) -> None:
    Path("buggy_reward.py").write_text("table = {}\ntable['missing']\n")
    with pytest.raises(KeyError, match="missing"):
        check_rewards(Config(reward=RewardConfig(custom="buggy_reward:one")), PROGRAM)


def test_a_problem_without_its_facts_is_ungraded_and_not_wrong() -> None:
    broken = Problem(problem_id=3, task="countdown", prompt="", prompt_ids=(), answer="")
    score = grade(broken, "<think></think><answer>1</answer>", Config())
    assert not score.is_graded and "KeyError" in score.cause


def test_a_users_reward_is_found_by_its_name(users_module: str) -> None:
    config = Config(reward=RewardConfig(custom=f"{users_module}:short", custom_weight=0.5))
    score = grade(PROGRAM, RIGHT, config)
    assert score.parts["custom"] == -len(RIGHT)
    assert score.value == pytest.approx(1.1 - 0.5 * len(RIGHT), abs=1e-12)
    for reward in (RewardConfig(custom=f"{users_module}:number"), RewardConfig(judge=f"{users_module}:number")):
        with pytest.raises(ConfigError, match="has no function 'number'"):
            check_rewards(Config(reward=reward), PROGRAM)


@pytest.mark.parametrize("entry_point,message", [
    ("no_such_module_here:f", "importing 'no_such_module_here' failed"), ("justaname", "must be 'module:function'"),
    (":f", "must be 'module:function'"), ("math:", "must be 'module:function'"), ("math:no", "has no function 'no'"),
])
def test_a_reward_that_cannot_be_loaded_is_refused_before_work_starts(entry_point: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_rewards(Config(reward=RewardConfig(custom=entry_point)), PROGRAM)


def test_a_reward_model_that_is_not_there_is_refused_before_work_starts(tmp_path: Path) -> None:
    for name in ("config.json", "reward_head.safetensors"):
        with pytest.raises(ConfigError, match=f"reward.model must be a reward model's folder, but there is no {name} in"):
            check_rewards(Config(reward=RewardConfig(model=str(tmp_path))), PROGRAM)
        (tmp_path / name).touch()
    assert check_rewards(Config(reward=RewardConfig(model=str(tmp_path))), PROGRAM) == []


def test_the_completion_prefix_of_the_prompt_is_graded_with_the_completion(users_module: str) -> None:
    opened = replace(PROGRAM, completion_prefix="<think>")
    config = Config(reward=RewardConfig(custom=f"{users_module}:short"))
    whole, rest = grade(PROGRAM, RIGHT, config), RIGHT.removeprefix("<think>")
    assert whole.parts["format"] == 1.0 and grade(opened, rest, config) == whole  # the custom part is its length
    assert grade(PROGRAM, rest, config).parts["format"] == 0.0
    assert grade(opened, RIGHT, config).parts["format"] == 0.0  # a second opening tag


FORMS = [("18", "18"), ("1080", "1,080"), ("-7", "-7"), ("2.50", "2.5"), ("\\frac{3}{4}", "\\frac{3}{4}"), ("3/4", "0.75"),
         ("18", "\\$18"),
         ("5", "x = 5"), ("25", "25\\%"), ("2\\sqrt{3}", "2\\sqrt{3}"), ("17", "18")]


def test_two_thousand_gradings_a_second_and_more_with_the_workers_round_trip() -> None:
    """The best of several runs, as other tests slow the machine down; the limit is a tenth of an idle machine's rate."""
    requests = [{"text": f"<think>{'so it goes on ' * 40}</think> It is \\boxed{{{given_text}}}.", "answer": answer}
                for answer, given_text in FORMS] * 200
    with VerifierService(reward_kinds(RewardConfig()), num_workers=2) as service:
        service.grade("math", requests)
        rates = []
        for _ in range(3):
            start = time.perf_counter()
            verdicts = service.grade("math", requests)
            rates.append(len(requests) / (time.perf_counter() - start))
    assert [v.status for v in verdicts[: len(FORMS)]] == ["right"] * (len(FORMS) - 1) + ["wrong"]
    assert max(rates) > 2000, rates
