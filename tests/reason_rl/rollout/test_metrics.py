"""Metrics of groups that are small enough to count by hand."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
import torch

from reason_rl.data import char_tokenizer
from reason_rl.records import Completion, Group, Microbatch, Problem, Score
from reason_rl.report.clock import Clock
from reason_rl.rl.advantages import Advantages
from reason_rl.rollout.metrics import (
    eval_metrics,
    pass_at_k,
    pass_at_powers,
    rollout_metrics,
    rollout_rows,
    step_stats,
    update_metrics,
)

TOKENIZER = char_tokenizer()


def completion(text: str, index: int, ended: bool = True) -> Completion:
    ids = (*TOKENIZER.encode(text), *((TOKENIZER.eos_id,) if ended else ()))
    return Completion(ids, (-0.5,) * len(ids), (0.0,) * len(ids), "stop" if ended else "length", 0, index)


THOUGHT = completion("<think>1+1=2</think><answer>2</answer>", 0)  # 5 thinking tokens, 11 in all
DIRECT = completion("<think></think><answer>3</answer>", 1)  # none, 6 in all
CUT = completion("<think>1+", 2, ended=False)  # 2, not closed, 3 in all
BARE = completion("2", 3)  # no tags, 2 in all
GROUP = Group(Problem(5, "program", "p?", (9, 9), "2", level=4), (THOUGHT, DIRECT, CUT, BARE), (
    Score(1.1, {"accuracy": 1.0, "format": 1.0}),
    Score(0.1, {"accuracy": 0.0, "format": 1.0}),
    Score(0.0, {"accuracy": 0.0, "format": 0.0}),
    Score(0.0, {}, is_graded=False, cause="accuracy raised: KeyError"),
))


@pytest.mark.parametrize(("n", "c"), [(4, 0), (4, 1), (5, 2), (6, 6), (7, 5)])
def test_pass_at_k_is_the_fraction_of_subsets_with_a_right_sample(n: int, c: int):
    for k in range(1, n + 1):
        subsets = list(combinations(range(n), k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(min(s) < c for s in subsets) / len(subsets), abs=1e-15)


@pytest.mark.parametrize("k", [0, 5])
def test_pass_at_k_needs_k_samples(k: int):
    with pytest.raises(ValueError, match=r"k must be in 1\.\.4"):
        pass_at_k(4, 2, k)


def test_pass_at_powers_averages_over_problems_for_powers_of_two():
    right, wrong = Score(1.0, {"accuracy": 1.0}), Score(0.0, {"accuracy": 0.0})
    groups = [Group(GROUP.problem, (DIRECT,) * 6, scores) for scores in ((right, *[wrong] * 5), (right,) * 6)]
    values = pass_at_powers(groups)
    assert values == pytest.approx({"1": (1 / 6 + 1) / 2, "2": (1 / 3 + 1) / 2, "4": (2 / 3 + 1) / 2})
    assert pass_at_powers([]) == {}


def test_rollout_metrics_of_a_group_counted_by_hand():
    values = rollout_metrics([GROUP], TOKENIZER)
    assert values == pytest.approx({
        "reward": 1.2 / 3, "reward/accuracy": 1 / 3, "reward/format": 2 / 3,  # over the three that were graded
        "accuracy": 1 / 3, "format_rate": 2 / 4, "thinks_share": 2 / 4, "truncated_share": 1 / 4,
        "accuracy_given_thought": 1 / 2, "accuracy_given_none": 0.0,
        "length": (11 + 6 + 3 + 2) / 4, "thinking_tokens": 7 / 4, "ungraded": 1.0, "ungraded/accuracy_raised": 1.0,
    })


def test_eval_metrics_of_a_group_counted_by_hand():
    values = eval_metrics([GROUP, GROUP], TOKENIZER)
    assert values == pytest.approx({
        "problems": 2, "samples": 4, "accuracy": 1 / 3, "format_rate": 2 / 4, "thinks_share": 2 / 4, "truncated_share": 1 / 4,
        "accuracy_given_thought": 1 / 2, "accuracy_given_none": 0.0, "mean_thinking_tokens": 7 / 4,
        "mean_thinking_tokens_among_thinkers": 7 / 2, "ungraded": 2, "ungraded/accuracy_raised": 2.0,
    })


def test_an_ungraded_completion_does_not_count_as_wrong():
    right, wrong, unknown = Score(1.0, {"accuracy": 1.0}), Score(0.0, {"accuracy": 0.0}), GROUP.scores[3]
    judged = Score(0.0, {"accuracy": 1.0}, is_graded=False, cause="judge deadline: no verdict")  # accuracy is known
    groups = [Group(GROUP.problem, (DIRECT,) * 4, scores)
              for scores in ((right, unknown, unknown, unknown), (wrong, judged, unknown, right))]
    assert pass_at_powers(groups) == pytest.approx({"1": (1 + 2 / 3) / 2, "2": 1.0})
    values = eval_metrics(groups, TOKENIZER)
    assert values["accuracy"] == values["accuracy_given_none"] == 3 / 4
    assert values["ungraded"] == 5 and values["ungraded/judge_deadline"] == 1 and values["ungraded/accuracy_raised"] == 4
    assert eval_metrics([replace(groups[0], scores=(unknown,) * 4)], TOKENIZER)["accuracy"] is None
    assert pass_at_powers([replace(groups[0], scores=(unknown,) * 4)]) == {}


def test_a_partial_accuracy_does_not_count_as_right():
    group = Group(GROUP.problem, (DIRECT,) * 2, (Score(0.75, {"accuracy": 0.75}), Score(1.0, {"accuracy": 1.0})))
    assert eval_metrics([group], TOKENIZER)["accuracy"] == rollout_metrics([group], TOKENIZER)["accuracy"] == 1 / 2
    assert pass_at_powers([group]) == {"1": 1 / 2, "2": 1.0}


def test_a_mean_over_nothing_is_none():
    direct = Group(GROUP.problem, (DIRECT,), GROUP.scores[1:2])
    values = eval_metrics([direct], TOKENIZER)
    assert values["accuracy_given_thought"] is None and values["mean_thinking_tokens_among_thinkers"] is None
    ungraded = Group(GROUP.problem, (BARE,), GROUP.scores[3:])
    assert rollout_metrics([ungraded], TOKENIZER)["reward"] is None


def test_update_metrics_weigh_by_tokens_and_keep_extremes_and_the_first_gap():
    first = {"loss": 1.0, "num_loss_tokens": 10.0, "ratio_max": 1.0, "ratio_min": 1.0, "grad_norm": 2.0,
             "clip_low_fraction": 0.0, "max_abs_logprob_gap": 0.0}
    second = {"loss": 4.0, "num_loss_tokens": 30.0, "ratio_max": 1.5, "ratio_min": 0.5, "grad_norm": 1.0,
              "clip_low_fraction": 0.4, "max_abs_logprob_gap": 0.7}
    assert update_metrics([first, second]) == pytest.approx({
        "loss": 3.25, "num_loss_tokens": 40.0, "ratio_max": 1.5, "ratio_min": 0.5, "grad_norm": 2.0, "clip_low": 0.3,
        "max_abs_logprob_gap": 0.0})
    assert update_metrics([]) == {"num_loss_tokens": 0.0}


def test_rollout_rows_hold_each_token_with_its_logprob():
    rows = rollout_rows([GROUP] * 2, [[0.5, -0.5, 0.0, 0.0]] * 5, TOKENIZER, 12)
    assert len(rows) == 4 * 2
    row = rows[4]
    assert (row["group"], row["sample"], row["step"], row["problem_id"], row["level"]) == (1, 0, 12, 5, 4)
    assert row["text"] == "<think>1+1=2</think><answer>2</answer>" and row["tokens"][-1] == "<eos>"  # type: ignore[index]
    assert len(row["tokens"]) == len(row["logprobs"]) == 11  # type: ignore[arg-type]
    assert (row["advantage"], row["reward"], row["parts"]) == (0.5, 1.1, {"accuracy": 1.0, "format": 1.0})
    assert rows[3]["is_graded"] is False and rows[3]["cause"] == "accuracy raised: KeyError" and rows[2]["cause"] == ""
    assert rows[2]["finish_reason"] == "length"


def test_step_stats_count_all_sampled_groups_and_the_packed_tokens():
    advantages = Advantages(torch.tensor([[0.5, -0.5, 0.0, 0.0]]), torch.ones(1, 4, dtype=torch.bool), torch.tensor([True]))
    tensor = torch.zeros(6, dtype=torch.long)
    microbatch = Microbatch(tensor, tensor, tensor, tensor, tensor, tensor, 1)
    clock = Clock()
    clock.seconds |= {"rollout": 2.0, "reward": 1.0, "train": 3.0, "step": 8.0}
    stats = step_stats(7, [GROUP], [GROUP, GROUP], advantages, [[microbatch] * 2, [microbatch]], [], TOKENIZER, clock,
                       lr=1e-4, verifiers={"gradings": 8.0})
    assert stats.timings == {
        "rollout_s": 2.0, "reward_s": 1.0, "verifier/gradings": 8.0, "train_s": 3.0, "step_s": 8.0,
        "train_tok_s": 18 / 3, "rollout_tok_s": 44 / 2, "step_tok_s": 44 / 8}
    assert stats.metrics["length"] == 22 / 4 and stats.metrics["ungraded"] == 2 and stats.metrics["num_loss_tokens"] == 0
    assert stats.metrics["lr"] == 1e-4 and stats.metrics["groups_without_signal"] == 0
    assert (stats.step, stats.groups, stats.advantages) == (7, (GROUP,), ((0.5, -0.5, 0.0, 0.0),))
