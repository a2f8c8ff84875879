"""The numbers of an evaluation, on rows that are small enough to count by hand; votes by equality of answers."""

from __future__ import annotations

import statistics
from itertools import product
from typing import Any

import numpy as np
import pytest

from reason_rl.answers.verdict import ungradable
from reason_rl.answers.votes import answer_of, group_answers
from reason_rl.config import RewardConfig
from reason_rl.data import char_tokenizer
from reason_rl.eval.metrics import consensus, estimate, majority, pass_rate, problem_row, summarise
from reason_rl.records import Completion, Group, Problem, Score
from reason_rl.reward.grade import reward_kinds
from reason_rl.reward.pool.service import VerifierService

TOKENIZER = char_tokenizer()
RIGHT, WRONG = Score(1.0, {"accuracy": 1.0, "format": 1.0}), Score(0.0, {"accuracy": 0.0, "format": 0.0})
UNKNOWN = Score(0.0, {"format": 1.0}, is_graded=False, cause="accuracy deadline: no verdict within 5 s")


def groups_of(answers: list[str], verifier: str) -> list[int]:
    verdict = group_answers({"answers": answers, "verifier": verifier})
    assert list(verdict.parts) == [str(place) for place in range(len(answers))]
    assert verdict.value == len(set(verdict.parts.values()))
    return [int(place) for place in verdict.parts.values()]


@pytest.mark.parametrize(("verifier", "answers", "groups"), [
    ("text", ["5", "05", "5", "6"], [0, 1, 0, 3]),
    ("countdown", ["(9-7)*8", "8*(9-7)", "(9-7)*8"], [0, 1, 0]),
    ("math", ["0.5", "\\frac{1}{2}", "1/2", "2/4", "0.51"], [0, 0, 0, 0, 4]),
    ("math", ["72", "48+24", "72.0", "$72"], [0, 1, 0, 0]),  # an unevaluated sum is another answer, though of equal value
    ("math", ["48+24", "72", "48 + 24"], [0, 1, 0]),  # in either order
    ("math", ["1,2", "2,1", "(1,2)", "(2,1)"], [0, 0, 2, 3]),
    ("math", ["\\frac{", "x^", "\\frac{"], [0, 1, 0]),  # an unreadable answer equals its own text only
    ("math", ["East", "east", "west"], [0, 0, 2]),
    ("math", [], []),
])  # fmt: skip
def test_answers_are_equal_if_each_is_right_with_the_other_as_reference(verifier: str, answers: list[str], groups: list[int]):
    assert groups_of(answers, verifier) == groups


def test_an_answer_is_the_text_that_the_verifier_reads():
    text = "<think>\\boxed{4}</think><answer> 5 </answer>"
    assert answer_of(text, "text") == answer_of(text, "countdown") == answer_of(text, "math") == "5"
    assert answer_of("so \\boxed{\\frac12}", "math") == "\\frac12" and answer_of("so \\boxed{\\frac12}", "text") is None
    assert answer_of("<answer></answer>", "text") is None and answer_of("<answer></answer>", "math") is None
    assert answer_of(text, "code") is None


def test_votes_are_counted_in_a_worker_however_hostile_the_answers():
    hostile = ["9^{9^{9^{9}}}", "(" * 5000 + "5" + ")" * 5000, "\\sqrt" * 150 + "5", "1" + "+1" * 450, *map(str, range(60))]
    with VerifierService(reward_kinds(RewardConfig()), num_workers=1) as service:
        (verdict,) = service.grade("votes", [{"answers": hostile + hostile, "verifier": "math"}])
    assert verdict.is_graded and [verdict.parts[str(n)] for n in range(128)] == [*range(64), *range(64)]


def completion(text: str, index: int, ended: bool = True) -> Completion:
    ids = (*TOKENIZER.encode(text), *((TOKENIZER.eos_id,) if ended else ()))
    return Completion(ids, (-0.5,) * len(ids), (0.0,) * len(ids), "stop" if ended else "length", 0, index)


def row_of(answers: str, problem_id: int = 5, graded: bool = True) -> dict[str, Any]:
    """One letter per sample. r: right, a and b: two wrong answers, R: right but truncated, -: no answer, ?: ungraded."""
    texts = {"r": "2", "R": "2", "a": "3", "b": "4", "?": "x"}
    scores = {"r": RIGHT, "R": RIGHT, "?": UNKNOWN}
    completions = tuple(completion(f"<think>1</think><answer>{texts[a]}</answer>" if a != "-" else "2", n, ended=a != "R")
                        for n, a in enumerate(answers))
    problem = Problem(problem_id, "program", "p?", (9, 9), "2", level=4)
    group = Group(problem, completions, tuple(scores.get(a, WRONG) for a in answers))
    given = [texts.get(a) for a in answers]
    votes = group_answers({"answers": [g for g, a in zip(given, answers) if g is not None and a != "R"], "verifier": "text"})
    return problem_row(group, given, votes if graded else ungradable("deadline", "slow"), TOKENIZER)


def test_a_row_counts_the_samples_and_lists_them():
    row = row_of("ra-R?")
    samples = row.pop("samples")
    assert row == {"problem_id": 5, "prompt": "p?", "answer": "2", "level": 4, "num_samples": 5, "num_graded": 4, "num_right": 2,
                   "pass_rate": 0.5, "votes_missing": ""}
    assert samples[0] == {"text": "<think>1</think><answer>2</answer>", "is_right": True, "answer": "2", "vote": 0,
                          "is_well_formed": True, "tokens": 7, "thinking_tokens": 1, "finish_reason": "stop", "logprob": -3.5,
                          "cause": ""}
    assert [s["is_right"] for s in samples] == [True, False, False, True, None]
    assert [s["answer"] for s in samples] == ["2", "3", None, "2", "x"]
    assert [s["vote"] for s in samples] == [0, 1, None, None, 4]  # no vote without an answer or when truncated
    assert samples[4]["cause"].startswith("accuracy deadline") and samples[3]["finish_reason"] == "length"
    assert row_of("??")["pass_rate"] is None


@pytest.mark.parametrize(("answers", "is_right"), [
    ("rra", True), ("raa", False), ("ra", True), ("ar", False), ("abr", False), ("brrb", False), ("arrb", True),
    ("---r", True), ("aRRR", False), ("----", False), ("RR", False), ("??r", None), ("?rr", True),
])  # fmt: skip
def test_the_majority_is_the_most_frequent_answer_and_among_equals_the_first(answers: str, is_right: bool | None):
    assert majority(row_of(answers)["samples"]) is is_right


def test_consensus_is_the_mean_over_disjoint_runs_of_k():
    row = row_of("rraaarrr")
    assert consensus(row, 8) == 1.0  # 5 to 3
    assert consensus(row, 4) == 1.0  # rraa: r came first, arrr
    assert consensus(row, 3) == 0.5  # rra, aar; the last two do not make a run of three
    assert consensus(row, 2) == 0.5  # rr, aa, ar (a came first), rr
    assert consensus(row_of("rr??"), 2) == 1.0 and consensus(row_of("????"), 2) is None
    assert consensus(row_of("rrrr", graded=False), 2) is None


def test_pass_rate_counts_graded_samples_only():
    assert pass_rate(row_of("rabb"), 1) == 0.25 and pass_rate(row_of("rabb"), 2) == pytest.approx(0.5)
    assert pass_rate(row_of("ra??"), 1) == 0.5 and pass_rate(row_of("ra??"), 2) == 1.0 and pass_rate(row_of("ra??"), 3) is None


def test_a_summary_counted_by_hand():
    rows = [row_of("rrab", 1), row_of("a--R", 2), row_of("r?rr", 3)]
    summary = summarise(rows, (1, 2, 4))
    assert (summary["problems"], summary["samples"], summary["completions"]) == (3, 4, 12)
    assert summary["pass_at_k"]["1"]["mean"] == pytest.approx((0.5 + 0.25 + 1.0) / 3)
    assert summary["pass_at_k"]["2"]["mean"] == pytest.approx((5 / 6 + 0.5 + 1.0) / 3)
    assert summary["pass_at_k"]["4"] == estimate([1.0, 1.0, None]) and summary["pass_at_k"]["4"]["problems"] == 2
    assert summary["cons_at_k"]["4"]["mean"] == pytest.approx((1 + 0 + 1) / 3)
    assert summary["cons_at_k"]["2"]["mean"] == pytest.approx((0.5 + 0.0 + 1.0) / 3)
    assert "1" not in summary["cons_at_k"]
    assert summary["length"]["mean"] == pytest.approx((7 + (7 + 2 + 2 + 6) / 4 + 7) / 3)
    assert summary["thinking_tokens"]["mean"] == pytest.approx((1 + 0.5 + 1) / 3)
    assert summary["format_rate"]["mean"] == pytest.approx((0.5 + 0.25 + 1.0) / 3)
    assert (summary["truncated"], summary["without_answer"], summary["ungradable"]) == (1, 2, 1)
    assert summary["ungradable_causes"] == {"accuracy_deadline": 1} and summary["votes_missing"] == {}


def test_missing_votes_are_counted_and_cons_without_any_votes_is_none():
    summary = summarise([row_of("rr", 1, graded=False), row_of("rr", 2, graded=False)], (2,))
    assert summary["cons_at_k"]["2"] == {"mean": None, "low": None, "high": None, "problems": 0}
    assert summary["votes_missing"] == {"deadline: slow": 2} and summary["pass_at_k"]["2"]["mean"] == 1.0


def test_an_interval_is_near_the_normal_one_and_repeatable():
    values = list(np.random.default_rng(1).random(400))
    found = estimate(values)
    assert found == estimate(values)
    half = 1.96 * statistics.pstdev(values) / 20
    # 8 %: 2,000 draws leave each end an error of 3 % of the half-width.
    assert found["high"] - found["mean"] == pytest.approx(half, rel=0.08)
    assert found["mean"] - found["low"] == pytest.approx(half, rel=0.08)
    assert found["mean"] == pytest.approx(statistics.fmean(values)) and found["problems"] == 400


def test_an_interval_is_taken_over_problems_and_not_over_their_samples():
    """More samples of the same two problems do not narrow it."""
    rows = [row_of("rrrrrrrr", 1), row_of("aaaaaaaa", 2)]
    assert summarise(rows, (1,))["pass_at_k"]["1"] == {"mean": 0.5, "low": 0.0, "high": 1.0, "problems": 2}


def test_unknown_values_are_left_out_and_one_problem_has_no_interval():
    assert estimate([]) == {"mean": None, "low": None, "high": None, "problems": 0}
    assert estimate([None, 0.5]) == {"mean": 0.5, "low": None, "high": None, "problems": 1}
    assert estimate([None, 0.25, 0.25]) == {"mean": 0.25, "low": 0.25, "high": 0.25, "problems": 2}


def test_majority_of_two_answers_agrees_with_counting():
    for answers in product("ra", repeat=5):
        assert majority(row_of("".join(answers))["samples"]) is (answers.count("r") >= 3)
