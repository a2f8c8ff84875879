"""Advantages of graded groups, and the mask of the completions that take part in the update."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.group_advantage import group_advantage
from reason_rl.config import RLConfig
from reason_rl.records import Completion, Group, Problem, Score
from reason_rl.rl.advantages import compute_advantages, has_signal

CPU = torch.device("cpu")


def make_group(rewards: Sequence[float], ungraded: Sequence[int] = (), truncated: Sequence[int] = ()) -> Group:
    problem = Problem(problem_id=0, task="test", prompt="?", prompt_ids=(1,), answer="")
    completions = tuple(
        Completion((2, 3), (-1.0, -1.0), (0.0, 0.0), "length" if i in truncated else "stop", 0, i)
        for i in range(len(rewards))
    )
    scores = tuple(Score(value, {"accuracy": value}, is_graded=i not in ungraded) for i, value in enumerate(rewards))
    return Group(problem, completions).with_scores(scores)


def test_everyone_takes_part_where_all_is_well() -> None:
    result = compute_advantages([make_group([0, 1]), make_group([1, 3])], RLConfig(advantage="mean"), CPU)
    assert result.advantages.tolist() == [[-0.5, 0.5], [-1.0, 1.0]]
    assert result.advantages.dtype == torch.float32 and result.mask.dtype == result.has_signal.dtype == torch.bool
    assert result.mask.all() and result.has_signal.all()


def test_an_ungraded_completion_is_in_neither_statistics_nor_update() -> None:
    # The reward of an ungraded completion means nothing, here NaN: it must not be read.
    result = compute_advantages([make_group([0, math.nan, 1], ungraded=[1])], RLConfig(advantage="mean"), CPU)
    assert result.advantages.tolist() == [[-0.5, 0.0, 0.5]]
    assert result.mask.tolist() == [[True, False, True]]


@pytest.mark.parametrize("drop", [True, False])
def test_groups_without_signal_leave_the_update_only_if_asked(drop: bool) -> None:
    groups = [make_group([1, 1, 1]), make_group([0, 1, 1]), make_group([0, 1, 9], ungraded=[0, 2])]
    result = compute_advantages(groups, RLConfig(drop_no_signal=drop), CPU)
    assert result.has_signal.tolist() == [False, True, False]
    kept = [not drop] * 3, [True] * 3, [False, not drop, False]
    assert result.mask.tolist() == [list(row) for row in kept]
    assert (result.advantages[0] == 0).all() and (result.advantages[2] == 0).all()


@pytest.mark.parametrize("drop", [True, False])
def test_truncated_completions_count_in_the_statistics_but_leave_the_update_if_asked(drop: bool) -> None:
    result = compute_advantages([make_group([0, 0, 3], truncated=[0])], RLConfig(advantage="mean", drop_truncated=drop), CPU)
    assert result.mask.tolist() == [[not drop, True, True]]
    assert result.advantages.tolist() == [[0.0 if drop else -1.0, -1.0, 2.0]]


def test_batch_std_reads_all_groups() -> None:
    config = RLConfig(advantage="batch_std")
    near, far = make_group([0, 1]), make_group([0, 100])
    alone = compute_advantages([near], config, CPU).advantages[0, 1]
    together = compute_advantages([near, far], config, CPU).advantages[0, 1]
    assert together < alone / 10


def test_groups_of_another_size_or_without_scores_are_refused() -> None:
    unscored = Group(make_group([0, 1]).problem, make_group([0, 1]).completions)
    for groups, words in (
        ([], "at least one group"),
        ([make_group([0, 1]), make_group([0, 1, 1])], "G = 2 .*group 1 has 3 and 3"),
        ([unscored], "group 0 has 2 and 0"),
    ):
        with pytest.raises(ValueError, match=words):
            compute_advantages(groups, RLConfig(), CPU)


def test_a_graded_reward_that_is_nan_raises() -> None:
    with pytest.raises(ValueError, match="finite, got nan for completion 1 of group 0"):
        compute_advantages([make_group([0, math.nan])], RLConfig(), CPU)


REWARDS = st.sampled_from([0.0, 1.0, 0.1, 0.3, 0.1 + 0.2, 1e-9, 1.0 + 1e-9])
"""0.3 and 0.1 + 0.2 differ in f64 but not in f32; so do 1.0 and 1.0 + 1e-9."""


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.tuples(REWARDS, st.booleans()), min_size=3, max_size=3), min_size=1, max_size=4))
def test_the_hosts_has_signal_is_the_ops(batch: list[list[tuple[float, bool]]]) -> None:
    """Packing selects completions by the host's, so that it need not wait for the device's."""
    groups = [make_group([r for r, _ in group], ungraded=[i for i, (_, ok) in enumerate(group) if not ok]) for group in batch]
    rewards = torch.tensor([[r for r, _ in group] for group in batch], dtype=torch.float32)
    _, wanted = group_advantage(rewards, torch.tensor([[ok for _, ok in group] for group in batch]))
    assert [has_signal(group) for group in groups] == wanted.tolist()
    assert torch.equal(compute_advantages(groups, RLConfig(), CPU).has_signal, wanted)


def test_the_mask_is_on_the_host_and_the_advantages_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a meta device, which has no values: any read of the advantages on the host would raise."""
    meta = torch.device("meta")
    monkeypatch.setattr("reason_rl.rl.advantages.group_advantage", lambda rewards, mask, kind: (
        torch.empty_like(rewards), torch.empty(len(rewards), dtype=torch.bool, device=rewards.device)))
    result = compute_advantages([make_group([0, 1]), make_group([1, 1])], RLConfig(), meta)
    assert result.advantages.device == meta and result.mask.tolist() == [[True, True], [False, False]]
    assert result.has_signal.tolist() == [True, False]
