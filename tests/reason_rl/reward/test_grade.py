"""Rewards: right answers pay, tricks do not, and a reward that fails never ends the run."""

from __future__ import annotations

import sys
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest
from reason_rl.reward.accuracy import extract_answer
from reason_rl.reward.format import format_reward
from reason_rl.reward.length import cosine_reward, overlong_reward

from reason_rl.answers.countdown import is_countdown_solution
from reason_rl.answers.verdict import Verdict
from reason_rl.config import Config, RewardConfig
from reason_rl.records import Completion, FinishReason, Group, Problem, SamplingParams, Score
from reason_rl.reward import Grader, Pending, check_rewards
from reason_rl.reward.grade import reward_kinds
from reason_rl.reward.pool.service import VerifierService
from tests.reason_rl.tiny import grade_group

PROGRAM = Problem(problem_id=1, task="program", prompt="a2,b*3,c-1?", prompt_ids=(1, 2), answer="5", level=3)
COUNTDOWN = Problem(problem_id=2, task="countdown", prompt="a9b8c7=16?", prompt_ids=(1, 2), answer="(9-7)*8",
                    facts={"numbers": [9, 8, 7], "target": 16}, level=3)
RIGHT = "<think>a2,b*3=6,c-1=5</think><answer>5</answer>"


def completion(num_tokens: int = 10, finish_reason: FinishReason = "stop") -> Completion:
    zeros = (0.0,) * num_tokens
    return Completion(token_ids=(5,) * num_tokens, logprobs=zeros, kept_logmass=zeros, finish_reason=finish_reason,
                      policy_version=0, sample_index=0)


def group(count: int, problem: Problem = PROGRAM) -> Group:
    return Group(problem=problem, completions=tuple(completion() for _ in range(count)))


@pytest.mark.parametrize("text", [
    "(9-7)*8", " ( 9 - 7 ) * 8 ", "8*(9-7)", "((((9-7))))*8", "9*8-7*8", "(9-8)*16", "9-7*8", "(9-7)*8=16",
])
def test_only_expressions_with_each_number_once_that_hit_are_solutions(text: str) -> None:
    assert is_countdown_solution(text, [9, 8, 7], 16) == (text in ("(9-7)*8", " ( 9 - 7 ) * 8 ", "8*(9-7)",
                                                                   "((((9-7))))*8"))


def test_division_is_exact() -> None:
    assert is_countdown_solution("8/(3-8/3)", [3, 3, 8, 8], 24)
    assert is_countdown_solution("1/3*3", [1, 3, 3], 1)
    assert not is_countdown_solution("7/2", [7, 2], 3)
    assert not is_countdown_solution("9999/1000", [9999, 1000], 10)


def test_numbers_that_come_twice_are_used_twice() -> None:
    assert is_countdown_solution("6+6/6", [6, 6, 6], 7)
    assert not is_countdown_solution("6+6-5", [6, 6, 6], 7)
    assert not is_countdown_solution("6+1", [6, 6, 6], 7)
    assert not is_countdown_solution("6*6", [6, 6, 6], 36)


ATTACKS = {
    "power": "2**3", "floor division": "17//2", "modulo": "17%9", "name": "x", "true": "True", "call": "abs(8)",
    "implicit call": "8(1)", "attribute": "(8).real", "import": "__import__('os')", "lambda": "(lambda:8)()",
    "float": "8.0", "exponent": "8e0", "complex": "8j", "hexadecimal": "0x8", "underscore": "0_8", "leading zero": "08",
    "string": "'8'", "tuple": "8,", "list": "[8]", "comparison": "8==8", "shift": "8<<0", "bit or": "8|0", "not": "~8",
    "unary minus": "-(-8)", "unary plus": "+8", "empty": "", "blank": "   ", "only operators": "+-*/", "open": "(8",
    "close": "8)", "two expressions": "8 8", "new line": "8\n", "semicolon": "8;8", "comment": "8#", "walrus": "(a:=8)",
    "division by zero": "8/(0)", "hidden division by zero": "8/(8-8)", "arabic digit": "٨", "full-width digit": "８",
    "superscript": "8²", "full-width plus": "8＋0", "nul": "8\0",
    "huge number": "9" * 100, "huge product": "*".join(["9999"] * 30),
    "deep nesting": "(" * 60 + "8" + ")" * 60, "deeper nesting": "(" * 100_000 + "8" + ")" * 100_000,
    "long chain": "+".join(["1"] * 100_000), "many minuses": "-" * 120 + "8", "surrogate": "8\ud800",
}


@pytest.mark.parametrize("text", ATTACKS.values(), ids=ATTACKS.keys())
def test_tricks_are_no_solutions(text: str) -> None:
    for numbers in ([8], [8, 8], [8, 8, 8], [2, 3], [17, 2], [17, 9], [8, 0]):
        assert not is_countdown_solution(text, numbers, 8)


def test_the_plain_form_of_the_tricks_is_a_solution() -> None:
    """So the tests above fail for the trick and not for the numbers."""
    assert is_countdown_solution("8", [8], 8)
    assert is_countdown_solution("8+8-8", [8, 8, 8], 8)
    assert is_countdown_solution("8+0", [8, 0], 8)


def test_countdown_is_graded_by_value_and_programs_by_text() -> None:
    for answer in ("(9-7)*8", "8*(9-7)"):
        text = f"<think></think><answer>{answer}</answer>"
        assert grade(COUNTDOWN, text, completion(), Config()).parts["accuracy"] == 1.0
    assert grade(COUNTDOWN, "<think></think><answer>16</answer>", completion(), Config()).parts["accuracy"] == 0.0
    for answer, value in (("5", 1.0), (" 5 ", 1.0), ("05", 0.0), ("6", 0.0), ("", 0.0), ("55", 0.0)):
        text = f"<think></think><answer>{answer}</answer>"
        assert grade(PROGRAM, text, completion(), Config()).parts["accuracy"] == value


def test_exactly_one_answer_block_is_an_answer() -> None:
    assert extract_answer(RIGHT) == "5"
    assert extract_answer("<answer>5</answer> and more") == "5"
    for text in ("5", "<answer>5", "5</answer>", "</answer>5<answer>", "<answer>5</answer><answer>5</answer>",
                 "<answer><answer>5</answer>", "<answer>5</answer></answer>", ""):
        assert extract_answer(text) is None


def test_the_template_earns_the_format_reward() -> None:
    assert format_reward(RIGHT, "stop") == 1.0
    assert format_reward("<think></think><answer></answer>", "stop") == 1.0
    assert format_reward("<think>9<b 8>3!</think><answer>1</answer>", "stop") == 1.0


@pytest.mark.parametrize("text", [
    "", "5", "<answer>5</answer>", "<think>a</think>", " " + RIGHT, RIGHT + " ", RIGHT + "<eos>", RIGHT + RIGHT,
    "<think>a</think>\n<answer>5</answer>", "<think>a</think>b<answer>5</answer>", "<think>a<answer>5</answer>",
    "<think><think>a</think><answer>5</answer>", "<think>a</think></think><answer>5</answer>",
    "<answer>5</answer><think>a</think>", "<think>a<answer>5</answer></think>", "<think>a</think><answer>5",
    "<think>a</think><answer>5</answer>6</answer>", "a</think><answer>5</answer>",
])
def test_anything_else_does_not(text: str) -> None:
    assert format_reward(text, "stop") == 0.0


def test_a_completion_cut_at_its_length_is_not_well_formed() -> None:
    assert format_reward(RIGHT, "length") == 0.0


def test_the_overlong_penalty_is_daposs_ramp() -> None:
    """Equation 13 with max 100 and buffer 20."""
    lengths = {1: 0.0, 80: 0.0, 81: -0.05, 90: -0.5, 99: -0.95, 100: -1.0}
    for length, penalty in lengths.items():
        assert overlong_reward(length, "stop", 100, 20) == pytest.approx(penalty, abs=1e-12)
    assert overlong_reward(100, "length", 100, 20) == -1.0
    assert overlong_reward(100, "stop", 100, 0) == 0.0
    assert overlong_reward(100, "length", 100, 0) == -1.0


def test_the_cosine_reward_goes_from_its_short_end_to_its_long_one() -> None:
    reward = RewardConfig(cosine_right_short=2.0, cosine_right_long=1.0, cosine_wrong_short=-10.0, cosine_wrong_long=0.0,
                          cosine_cut=-10.0)
    expected = {(True, 0): 2.0, (True, 50): 1.5, (True, 100): 1.0, (False, 0): -10.0, (False, 50): -5.0, (False, 100): 0.0}
    for (is_right, num_tokens), value in expected.items():
        assert cosine_reward(is_right, num_tokens, "stop", 100, reward) == pytest.approx(value, abs=1e-12)
        assert cosine_reward(is_right, num_tokens, "length", 100, reward) == -10.0
    right = [cosine_reward(True, n, "stop", 100, reward) for n in range(101)]
    assert right == sorted(right, reverse=True)


def grade(problem: Problem, text: str, completion: Completion, config: Config) -> Score:
    with Grader(config) as grader:
        return grader.submit(problem, text, len(completion.token_ids), completion.finish_reason).score()


def test_the_value_is_the_weighted_sum_of_the_parts() -> None:
    config = Config(reward=RewardConfig(accuracy=2.0, format=0.25, overlong=0.5, overlong_buffer=10),
                    sampling=SamplingParams(max_tokens=20))
    score = grade(PROGRAM, RIGHT, completion(num_tokens=15), config)
    assert score.parts == {"accuracy": 1.0, "format": 1.0, "overlong": -0.5}
    assert score.value == 2.0 + 0.25 - 0.25
    assert score.is_graded and not score.cause


def test_every_part_that_has_a_weight_is_logged_and_counts() -> None:
    reward = RewardConfig(language=0.5, repetition=0.25, repetition_ngram=2, cosine=2.0, custom="bench.rewards:distinct_characters",
                          custom_weight=0.125, judge="bench.rewards:distinct_characters", judge_weight=-0.125)
    score = grade(PROGRAM, "<think>la la la la</think><answer>5</answer>", completion(num_tokens=10),
                  Config(reward=reward, sampling=SamplingParams(max_tokens=20)))
    assert score.parts.keys() == {"accuracy", "format", "overlong", "cosine", "language", "repetition", "custom", "judge"}
    assert score.parts["cosine"] == pytest.approx(0.75, abs=1e-12)  # half of the way from 1 to 0.5
    assert score.parts["custom"] == score.parts["judge"] > 0 and -1 < score.parts["repetition"] < 0
    assert score.value == pytest.approx(1 + 0.1 + 2 * 0.75 + 0.5 + 0.25 * score.parts["repetition"], abs=1e-12)


def test_accuracy_format_and_overlong_are_logged_without_a_weight() -> None:
    score = grade(PROGRAM, RIGHT, completion(finish_reason="length"), Config())
    assert score.parts["overlong"] == -1.0 and score.value == 1.0


def test_a_right_answer_out_of_format_still_counts_as_right() -> None:
    score = grade(PROGRAM, "so <answer>5</answer>", completion(), Config())
    assert score.parts == {"accuracy": 1.0, "format": 0.0, "overlong": 0.0} and score.value == 1.0


def test_the_task_says_what_decides_accuracy_unless_the_config_does() -> None:
    text = "<think></think><answer>5.0</answer>"
    assert grade(PROGRAM, text, completion(), Config()).parts["accuracy"] == 0.0
    assert grade(PROGRAM, text, completion(), Config(reward=RewardConfig(verifier="math"))).parts["accuracy"] == 1.0
    score = grade(replace(PROGRAM, task="gsm8k"), text, completion(), Config())
    assert score.parts == {"accuracy": 1.0, "format": 1.0, "overlong": 0.0}


USERS = """
import os, time
def fails(problem, text): raise KeyError("no such column")
def nan(problem, text): return float("nan")
def infinite(problem, text): return float("inf")
def none(problem, text): return None
def one_argument(problem): return 1.0
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
    ("one_argument", "custom raised: TypeError"), ("word", "custom raised: ValueError"),
    ("deep", "custom raised: RecursionError"), ("leaves", "custom raised: SystemExit"), ("gone", "custom crash: the worker died"),
    ("hangs", "custom deadline: no verdict within 0.3 s"),
])
def test_a_reward_that_fails_leaves_the_completion_ungraded(function: str, cause: str, users_module: str) -> None:
    config = Config(reward=RewardConfig(custom=f"{users_module}:{function}", custom_deadline_s=0.3))
    score = grade(PROGRAM, RIGHT, completion(), config)
    assert not score.is_graded and score.value == 0.0
    assert score.cause.startswith(cause)
    assert score.parts["accuracy"] == 1.0


def test_a_module_that_is_slow_to_import_is_not_on_a_completions_time(users_module: str) -> None:
    Path("slow_reward.py").write_text("import time\ntime.sleep(1.0)\ndef one(problem, text): return 1.0\n")
    score = grade(PROGRAM, RIGHT, completion(), Config(reward=RewardConfig(custom="slow_reward:one", custom_deadline_s=0.3)))
    assert score.is_graded and score.parts["custom"] == 1.0


def test_a_share_of_the_tests_earns_the_cosine_of_a_wrong_completion() -> None:
    config = Config(reward=RewardConfig(cosine=1.0))
    cosines = []
    for value in (0.0, 0.75, 1.0):
        future = Future[Verdict]()
        future.set_result(Verdict("right" if value else "wrong", value=value))
        with VerifierService(reward_kinds(config.reward)) as service:
            cosines.append(Pending(service, {"accuracy": ("code", future)}, 10, "stop", config).score().parts["cosine"])
    assert cosines[0] == cosines[1] < 0 < cosines[2]


@pytest.mark.parametrize(("verifier", "facts", "message"), [
    ("countdown", {}, "'countdown' needs numbers and target .* the task 'program' has none"),
    ("countdown", {"numbers": [1]}, r"needs target .* has \['numbers'\]"),
    ("code", {}, "'code' needs tests"), ("code", {"tests": []}, "'code' needs tests"),
])
def test_a_verifier_whose_facts_the_task_lacks_is_refused_before_work_starts(verifier: str, facts: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_rewards(Config(reward=RewardConfig(verifier=verifier)), replace(PROGRAM, facts=facts))
    assert check_rewards(Config(), COUNTDOWN) == []


def test_one_failing_completion_leaves_the_others_graded(users_module: str) -> None:
    with Grader(Config(reward=RewardConfig(custom=f"{users_module}:picky"))) as grader:
        graded = grade_group(group(3), [RIGHT, "", RIGHT], grader)
    assert [s.is_graded for s in graded.scores] == [True, False, True]
    assert graded.completions == group(3).completions


def test_a_problem_without_its_facts_is_ungraded_and_not_wrong() -> None:
    broken = Problem(problem_id=3, task="countdown", prompt="", prompt_ids=(), answer="")
    score = grade(broken, "<think></think><answer>1</answer>", completion(), Config())
    assert not score.is_graded and "KeyError" in score.cause


def test_a_users_reward_is_found_by_its_name(users_module: str) -> None:
    config = Config(reward=RewardConfig(custom=f"{users_module}:short", custom_weight=0.5))
    score = grade(PROGRAM, RIGHT, completion(), config)
    assert score.parts["custom"] == -len(RIGHT)
    assert score.value == pytest.approx(1.1 - 0.5 * len(RIGHT), abs=1e-12)
    for reward in (RewardConfig(custom=f"{users_module}:number"), RewardConfig(judge=f"{users_module}:number")):
        with pytest.raises(ValueError, match="has no function 'number'"):
            check_rewards(Config(reward=reward), PROGRAM)


@pytest.mark.parametrize("entry_point,message", [
    ("no_such_module_here:f", "importing 'no_such_module_here' failed"), ("justaname", "reads 'module:function'"),
    (":f", "reads 'module:function'"), ("math:", "reads 'module:function'"), ("math:no", "has no function 'no'"),
])
def test_a_reward_that_cannot_be_loaded_is_refused_before_work_starts(entry_point: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_rewards(Config(reward=RewardConfig(custom=entry_point)), PROGRAM)


def test_a_reward_model_that_is_not_there_is_refused_before_work_starts(tmp_path: Path) -> None:
    for name in ("config.json", "reward_head.safetensors"):
        with pytest.raises(ValueError, match=f"reward.model must be a reward model's folder, but there is no {name} in"):
            check_rewards(Config(reward=RewardConfig(model=str(tmp_path))), PROGRAM)
        (tmp_path / name).touch()
    assert check_rewards(Config(reward=RewardConfig(model=str(tmp_path))), PROGRAM) == []


def test_what_the_prompt_ends_with_counts_as_the_completions_own(users_module: str) -> None:
    opened = replace(PROGRAM, completion_prefix="<think>")
    config = Config(reward=RewardConfig(custom=f"{users_module}:short"))
    whole, rest = grade(PROGRAM, RIGHT, completion(), config), RIGHT.removeprefix("<think>")
    assert whole.parts["format"] == 1.0 and grade(opened, rest, completion(), config) == whole  # the custom part is its length
    assert grade(PROGRAM, rest, completion(), config).parts["format"] == 0.0
    assert grade(opened, RIGHT, completion(), config).parts["format"] == 0.0  # a second opening tag
