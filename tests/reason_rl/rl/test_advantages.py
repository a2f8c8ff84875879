"""From scored groups to advantages and the mask of who takes part in the update."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from reason_rl.config import RLConfig
from reason_rl.records import Completion, Group, Problem, Score
from reason_rl.rl.advantages import compute_advantages


def make_group(rewards: Sequence[float], ungraded: Sequence[int] = (), truncated: Sequence[int] = ()) -> Group:
    problem = Problem(problem_id=0, task="test", prompt="?", prompt_ids=(1,), answer="")
    completions = tuple(
        Completion((2, 3), (-1.0, -1.0), (0.0, 0.0), "length" if i in truncated else "stop", 0, i)
        for i in range(len(rewards))
    )
    scores = tuple(Score(value, {"accuracy": value}, is_graded=i not in ungraded) for i, value in enumerate(rewards))
    return Group(problem, completions).with_scores(scores)


def test_everyone_takes_part_where_all_is_well() -> None:
    result = compute_advantages([make_group([0, 1]), make_group([1, 3])], RLConfig(advantage="mean"))
    assert result.advantages.tolist() == [[-0.5, 0.5], [-1.0, 1.0]]
    assert result.advantages.dtype == torch.float32 and result.mask.dtype == result.has_signal.dtype == torch.bool
    assert result.mask.all() and result.has_signal.all()


def test_an_ungraded_completion_is_in_neither_statistics_nor_update() -> None:
    # The reward of an ungraded completion means nothing, here NaN: it must not be read.
    result = compute_advantages([make_group([0, math.nan, 1], ungraded=[1])], RLConfig(advantage="mean"))
    assert result.advantages.tolist() == [[-0.5, 0.0, 0.5]]
    assert result.mask.tolist() == [[True, False, True]]


@pytest.mark.parametrize("drop", [True, False])
def test_groups_without_signal_leave_the_update_only_if_asked(drop: bool) -> None:
    groups = [make_group([1, 1, 1]), make_group([0, 1, 1]), make_group([0, 1, 9], ungraded=[0, 2])]
    result = compute_advantages(groups, RLConfig(drop_no_signal=drop))
    assert result.has_signal.tolist() == [False, True, False]
    kept = [not drop] * 3, [True] * 3, [False, not drop, False]
    assert result.mask.tolist() == [list(row) for row in kept]
    assert (result.advantages[0] == 0).all() and (result.advantages[2] == 0).all()


@pytest.mark.parametrize("drop", [True, False])
def test_truncated_completions_count_in_the_statistics_but_leave_the_update_if_asked(drop: bool) -> None:
    result = compute_advantages([make_group([0, 0, 3], truncated=[0])], RLConfig(advantage="mean", drop_truncated=drop))
    assert result.mask.tolist() == [[not drop, True, True]]
    assert result.advantages.tolist() == [[0.0 if drop else -1.0, -1.0, 2.0]]


def test_batch_std_reads_all_groups() -> None:
    config = RLConfig(advantage="batch_std")
    near, far = make_group([0, 1]), make_group([0, 100])
    alone = compute_advantages([near], config).advantages[0, 1]
    together = compute_advantages([near, far], config).advantages[0, 1]
    assert together < alone / 10


def test_groups_of_another_size_or_without_scores_are_refused() -> None:
    unscored = Group(make_group([0, 1]).problem, make_group([0, 1]).completions)
    for groups, words in (
        ([], "at least one group"),
        ([make_group([0, 1]), make_group([0, 1, 1])], "G = 2 .*group 1 has 3 and 3"),
        ([unscored], "group 0 has 2 and 0"),
    ):
        with pytest.raises(ValueError, match=words):
            compute_advantages(groups, RLConfig())


def test_a_graded_reward_that_is_nan_raises() -> None:
    with pytest.raises(ValueError, match="finite"):
        compute_advantages([make_group([0, math.nan])], RLConfig())
