"""Packing: each group's prompt stands once, nothing is padded or split, and the budget holds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.attention import plan_segments
from reason_rl.records import Completion, Group, Microbatch, Problem
from reason_rl.rl.packing import idle_microbatch, pack_documents, pack_samples, select_samples, split_updates
from tests.reason_rl.tiny import hand_made_group, samples_of

A, B, C, X, Y, W, Z = range(10, 17)


def completion(tokens: tuple[int, ...], index: int) -> Completion:
    return Completion(tokens, tuple(-0.5 * (i + 1) for i in range(len(tokens))), (-0.25,) * len(tokens), "stop", 0, index)


def tokens_of(pack: Microbatch) -> list[list[int]]:
    """Target tokens by sequence."""
    return [pack.target_ids[pack.sequence_index == s].tolist() for s in range(pack.num_sequences)]


def test_the_worked_example_of_the_microbatch_docstring():
    group = Group(Problem(0, "t", "abc", (A, B, C), ""), (completion((X, Y, W), 0), completion((Z,), 1)))
    (pack,) = pack_samples(samples_of([group]), max_tokens=100)
    assert pack.token_ids.tolist() == [A, B, C, X, Y]
    assert pack.position_ids.tolist() == [0, 1, 2, 3, 4]
    assert pack.segments.tolist() == [[0, 3, 0, 0], [3, 2, 0, 3]]
    assert pack.logits_index.tolist() == [2, 3, 4, 2]
    assert pack.target_ids.tolist() == [X, Y, W, Z]
    assert pack.sequence_index.tolist() == [0, 0, 0, 1]
    assert pack.advantages is not None and pack.advantages.tolist() == [1.0, 1.0, 1.0, -1.25]
    assert pack.rollout_logprobs is not None and pack.rollout_logprobs.tolist() == [-0.5, -1.0, -1.5, -0.5]
    assert pack.kept_logmass is not None and pack.kept_logmass.tolist() == [-0.25] * 4
    assert (pack.num_tokens, pack.num_loss_tokens, pack.num_sequences) == (5, 4, 2)
    assert pack.position_ids.dtype == pack.segments.dtype == pack.sequence_index.dtype == torch.int32


def test_positions_of_every_completion_go_on_from_the_prompt():
    """As in the engine: never from the pack's start, and without padding on the left."""
    (pack,) = pack_samples(samples_of([hand_made_group(0, 5, [3, 4]), hand_made_group(1, 2, [3, 2])]), 1000)
    assert pack.position_ids.tolist() == [*range(5), 5, 6, 5, 6, 7, *range(2), 2, 3, 2]


def test_a_group_over_two_microbatches_repeats_its_prompt():
    group = hand_made_group(0, 4, [3, 3, 3])
    packs = pack_samples(samples_of([group]), max_tokens=10)  # prompt 4 + two completions of 3
    assert [pack.num_sequences for pack in packs] == [2, 1]
    assert all(pack.token_ids[:4].tolist() == list(group.problem.prompt_ids) for pack in packs)
    assert [row for pack in packs for row in tokens_of(pack)] == [list(c.token_ids) for c in group.completions]


def test_a_sample_larger_than_the_budget_stands_alone():
    packs = pack_samples(samples_of([hand_made_group(0, 2, [2, 30, 2])]), max_tokens=8)
    assert [pack.num_sequences for pack in packs] == [1, 1, 1]


def test_two_groups_of_one_prompt_are_not_taken_for_one():
    group = hand_made_group(0, 4, [3])
    (pack,) = pack_samples(samples_of([group, group]), 100)
    assert pack.segments.tolist() == [[0, 4, 0, 0], [4, 2, 0, 4], [6, 4, 0, 0], [10, 2, 6, 4]]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.lists(st.integers(1, 9), min_size=1, max_size=5)), min_size=1, max_size=6),
       st.integers(1, 40))
def test_packs_hold_every_token_once_within_the_budget(shapes: list[tuple[int, list[int]]], budget: int):
    groups = [hand_made_group(i, prompt, lengths) for i, (prompt, lengths) in enumerate(shapes)]
    packs = pack_samples(samples_of(groups), budget)
    packed = [row for pack in packs for row in tokens_of(pack)]
    assert packed == [list(c.token_ids) for group in groups for c in group.completions]
    for pack in packs:
        plan_segments(pack.segments, pack.num_tokens)  # raises unless the segments tile the pack
        assert pack.num_tokens <= budget or pack.num_sequences == 1
        # The predictor of a token after the first holds the token before it, one position earlier.
        is_later = pack.sequence_index.diff() == 0
        before = pack.token_ids[pack.logits_index[1:][is_later]]
        assert before.tolist() == pack.target_ids[:-1][is_later].tolist()


def test_select_samples_leaves_out_what_is_masked_and_keeps_the_order():
    groups = [hand_made_group(0, 2, [1, 2]), hand_made_group(1, 2, [3, 4])]
    advantages = torch.tensor([[0.5, -0.5], [1.0, 2.0]])
    chosen = select_samples(groups, advantages, torch.tensor([[True, False], [True, True]]))
    assert [(s.group_id, s.index, s.advantage) for s in chosen] == [(0, 0, 0.5), (1, 0, 1.0), (1, 1, 2.0)]


@pytest.mark.parametrize(("count", "parts"), [(8, 2), (7, 2), (5, 4), (1, 2), (0, 3)])
def test_split_updates_cuts_into_nearly_equal_parts_in_order(count: int, parts: int):
    samples = samples_of([hand_made_group(0, 1, [1] * count)]) if count else []
    split = split_updates(samples, parts)
    assert len(split) == parts and [s for part in split for s in part] == samples
    assert max(map(len, split)) - min(map(len, split)) <= 1


def test_documents_predict_from_the_second_token_on():
    (pack,) = pack_documents([((5, 6, 7), 0), ((8, 9), 0)], 100)
    assert pack.token_ids.tolist() == [5, 6, 8] and pack.target_ids.tolist() == [6, 7, 9]
    assert pack.logits_index.tolist() == [0, 1, 2] and pack.position_ids.tolist() == [0, 1, 0]
    assert pack.segments.tolist() == [[0, 2, 0, 0], [2, 1, 0, 0]]
    assert pack.sequence_index.tolist() == [0, 0, 1] and pack.num_sequences == 2
    assert pack.advantages is None


def test_a_documents_prompt_is_read_but_not_predicted():
    (pack,) = pack_documents([((5, 6, 7, 8), 2), ((1, 2), 1)], 100)
    assert pack.token_ids.tolist() == [5, 6, 7, 1]
    assert pack.target_ids.tolist() == [7, 8, 2] and pack.logits_index.tolist() == [1, 2, 3]


def test_documents_are_cut_by_the_budget_and_never_split():
    documents = [((1,) * n, 0) for n in (4, 4, 4, 9, 2)]
    assert [pack.num_sequences for pack in pack_documents(documents, 8)] == [2, 1, 1, 1]


@pytest.mark.parametrize("document", [((5,), 0), ((), 0), ((5, 6), 2)])
def test_a_document_without_anything_to_predict_is_refused(document: tuple[tuple[int, ...], int]):
    with pytest.raises(ValueError, match="needs a token to predict"):
        pack_documents([document], 8)


@pytest.mark.parametrize("is_rl", [True, False])
def test_an_idle_microbatch_has_one_token_and_no_loss(is_rl: bool):
    like = pack_samples(samples_of([hand_made_group(0, 3, [2])]), 9) if is_rl else pack_documents([((5, 6, 7), 0)], 9)
    idle = idle_microbatch(like[0])
    assert (idle.num_tokens, idle.num_loss_tokens, idle.num_sequences) == (1, 0, 0)
    assert (idle.advantages is not None) == is_rl
    plan_segments(idle.segments, idle.num_tokens)
