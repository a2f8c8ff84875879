"""Packing: each group's prompt is packed once, nothing is padded or split, and the budget holds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.attention import plan_segments
from reason_rl.config import RLConfig
from reason_rl.records import Completion, Group, Microbatch, Problem
from reason_rl.rl.advantages import Advantages, compute_advantages
from reason_rl.rl.packing import idle_microbatch, pack, pack_documents, select_samples, split_minibatches
from tests.reason_rl.tiny import CPU, graded, hand_made_group, packed, samples_of

A, B, C, X, Y, W, Z = range(10, 17)


def completion(tokens: tuple[int, ...], index: int) -> Completion:
    return Completion(tokens, tuple(-0.5 * (i + 1) for i in range(len(tokens))), (-0.25,) * len(tokens), "stop", 0, index)


def only(microbatches: list[Microbatch]) -> Microbatch:
    (microbatch,) = microbatches
    return microbatch


def tokens_of(pack: Microbatch) -> list[list[int]]:
    """Target tokens by sequence."""
    return [pack.target_ids[pack.sequence_index == s].tolist() for s in range(pack.num_sequences)]


EXAMPLE = Group(Problem(0, "t", "abc", (A, B, C), ""), (completion((X, Y, W), 0), completion((Z,), 1)))


def test_the_worked_example_of_the_microbatch_docstring():
    m = only(packed([EXAMPLE], 100))
    assert m.token_ids.tolist() == [A, B, C, X, Y]
    assert m.position_ids.tolist() == [0, 1, 2, 3, 4]
    assert m.segments.tolist() == [[0, 3, 0, 0], [3, 2, 0, 3]]
    assert m.logits_index.tolist() == [2, 3, 4, 2]
    assert m.target_ids.tolist() == [X, Y, W, Z]
    assert m.sequence_index.tolist() == [0, 0, 0, 1]
    assert m.advantages is not None and m.advantages.tolist() == [1.0, 1.0, 1.0, -1.25]
    assert m.rollout_logprobs is not None and m.rollout_logprobs.tolist() == [-0.5, -1.0, -1.5, -0.5]
    assert m.kept_logmass is not None and m.kept_logmass.tolist() == [-0.25] * 4
    assert (m.num_tokens, m.num_loss_tokens, m.num_sequences) == (5, 4, 2)
    assert m.position_ids.dtype == m.segments.dtype == m.sequence_index.dtype == torch.int32


def masked(token_mask: tuple[bool, ...]) -> Group:
    """The example, with a token mask on its first completion."""
    first, second = EXAMPLE.completions
    return replace(EXAMPLE, completions=(replace(first, token_mask=token_mask), second))


def test_an_inserted_token_is_context_and_never_a_target():
    """The second worked example of the Microbatch docstring: y was inserted."""
    m, all_sampled = only(packed([masked((True, False, True))], 100)), only(packed([EXAMPLE], 100))
    for name in ("token_ids", "position_ids", "segments"):
        assert torch.equal(getattr(m, name), getattr(all_sampled, name))
    assert m.logits_index.tolist() == [2, 4, 2] and m.target_ids.tolist() == [X, W, Z]
    assert m.sequence_index.tolist() == [0, 0, 1] and m.num_loss_tokens == 3
    assert m.advantages is not None and m.advantages.tolist() == [1.0, 1.0, -1.25]
    assert m.rollout_logprobs is not None and m.rollout_logprobs.tolist() == [-0.5, -1.5, -0.5]
    assert m.kept_logmass is not None and len(m.kept_logmass) == 3


def test_a_mask_of_all_tokens_packs_as_no_mask():
    m, unmasked = only(packed([masked((True,) * 3)], 100)), only(packed([EXAMPLE], 100))
    assert all(torch.equal(value, getattr(unmasked, name)) for name, value in vars(m).items() if torch.is_tensor(value))


def test_an_inserted_tail_stays_in_the_pack_as_the_engine_computed_it():
    """Routed expert ids have one entry for each token but the last, so tokens must not move."""
    m = only(packed([masked((True, False, False))], 100))
    assert m.token_ids.tolist() == [A, B, C, X, Y] and m.target_ids.tolist() == [X, Z]


def test_a_completion_without_a_sampled_token_has_nothing_to_train():
    group = masked((False,) * 3)
    assert [s.index for s in select_samples([group], torch.ones(1, 2, dtype=torch.bool))] == [1]


def test_a_token_mask_of_another_length_is_refused():
    with pytest.raises(ValueError, match="one entry for each of 3 tokens, got 2"):
        packed([masked((True, False))], 100)


def test_positions_of_every_completion_continue_the_prompts():
    """As in the engine: positions never count from the pack's start, and there is no padding on the left."""
    m = only(packed([hand_made_group(0, 5, [3, 4]), hand_made_group(1, 2, [3, 2])], 1000))
    assert m.position_ids.tolist() == [*range(5), 5, 6, 5, 6, 7, *range(2), 2, 3, 2]


def test_a_group_over_two_microbatches_repeats_its_prompt():
    group = hand_made_group(0, 4, [3, 3, 3])
    packs = packed([group], 10)  # prompt 4 + two completions of 3
    assert [m.num_sequences for m in packs] == [2, 1]
    assert all(m.token_ids[:4].tolist() == list(group.problem.prompt_ids) for m in packs)
    assert [tokens for m in packs for tokens in tokens_of(m)] == [list(c.token_ids) for c in group.completions]


def test_a_sample_larger_than_the_budget_has_a_microbatch_to_itself():
    packs = packed([hand_made_group(0, 2, [2, 30, 2])], 8)
    assert [m.num_sequences for m in packs] == [1, 1, 1]


def test_two_groups_of_one_prompt_are_not_merged():
    group = hand_made_group(0, 4, [3])
    m = only(packed([group, group], 100))
    assert m.segments.tolist() == [[0, 4, 0, 0], [4, 2, 0, 4], [6, 4, 0, 0], [10, 2, 6, 4]]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.lists(st.integers(1, 9), min_size=1, max_size=5)), min_size=1, max_size=6),
       st.integers(1, 40))
def test_packs_hold_every_token_once_within_the_budget(shapes: list[tuple[int, list[int]]], budget: int):
    groups = [hand_made_group(i, prompt, lengths) for i, (prompt, lengths) in enumerate(shapes)]
    packs = packed(groups, budget)
    found = [tokens for m in packs for tokens in tokens_of(m)]
    assert found == [list(c.token_ids) for group in groups for c in group.completions]
    for m in packs:
        plan_segments(m.segments, m.num_tokens)  # raises unless the segments tile the pack
        assert m.num_tokens <= budget or m.num_sequences == 1
        # A token after the first is predicted by the token before it.
        is_later = m.sequence_index.diff() == 0
        before = m.token_ids[m.logits_index[1:][is_later]]
        assert before.tolist() == m.target_ids[:-1][is_later].tolist()


def test_select_samples_leaves_out_what_is_masked_and_keeps_the_order():
    groups = [hand_made_group(0, 2, [1, 2]), hand_made_group(1, 2, [3, 4])]
    chosen = select_samples(groups, torch.tensor([[True, False], [True, True]]))
    assert [(s.group_id, s.index) for s in chosen] == [(0, 0), (1, 0), (1, 1)]


@pytest.mark.parametrize(("count", "num_minibatches"), [(8, 2), (7, 2), (5, 4), (1, 2), (0, 3)])
def test_split_minibatches_cuts_into_nearly_equal_lists_in_order(count: int, num_minibatches: int):
    samples = samples_of([hand_made_group(0, 1, [1] * count)]) if count else []
    split = split_minibatches(samples, num_minibatches)
    assert len(split) == num_minibatches and [s for minibatch in split for s in minibatch] == samples
    assert max(map(len, split)) - min(map(len, split)) <= 1


def test_pack_gives_each_loss_token_its_completions_advantage():
    groups = [hand_made_group(i, 3, [2, 1, 4]) for i in range(3)]
    values, mask = torch.arange(9.0).view(3, 3), torch.ones(3, 3, dtype=torch.bool)
    mask[1, 1] = False
    updates = pack(groups, Advantages(values, mask, mask.any(1)), num_minibatches=2, microbatch_tokens=1)
    assert [len(microbatches) for microbatches in updates] == [4, 4]  # a microbatch for each of 8 completions
    found = torch.cat([m.advantages for microbatches in updates for m in microbatches if m.advantages is not None])
    assert found.tolist() == [0, 0, 1, 2, 2, 2, 2, 3, 3, 5, 5, 5, 5, 6, 6, 7, 8, 8, 8, 8]


def test_pack_leaves_out_updates_without_completions():
    groups = [graded(hand_made_group(0, 3, [2, 2]), [1.0, 1.0])]
    assert pack(groups, compute_advantages(groups, RLConfig(drop_no_signal=True), CPU), 2, 100) == []
    (microbatches,) = pack(groups, Advantages(torch.ones(1, 2), torch.tensor([[True, False]]), torch.tensor([True])), 2, 100)
    assert only(microbatches).num_sequences == 1


def test_packing_never_reads_the_advantages_on_the_host():
    """A meta tensor has no values, so that any read raises; on a GPU the same read would wait for the device."""
    groups = [graded(hand_made_group(i, 3, [2, 1, 4])) for i in range(2)]
    estimate = compute_advantages(groups, RLConfig(), CPU)
    updates = pack(groups, replace(estimate, advantages=estimate.advantages.to("meta")), 2, 100)
    assert [m.advantages.device.type for u in updates for m in u if m.advantages is not None] == ["meta"] * 2


@pytest.mark.gpu
def test_advantages_reach_the_microbatches_of_a_gpu_without_a_sync():
    groups = [graded(hand_made_group(i, 3, [2, 1, 4])) for i in range(2)]
    cuda = torch.device("cuda")
    pack(groups, compute_advantages(groups, RLConfig(), cuda), 2, 100)  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        updates = pack(groups, compute_advantages(groups, RLConfig(), cuda), 2, 100)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = pack(groups, compute_advantages(groups, RLConfig(), CPU), 2, 100)
    for got, want in zip((m for u in updates for m in u), (m for u in expected for m in u), strict=True):
        assert got.advantages is not None and want.advantages is not None
        torch.testing.assert_close(got.advantages.cpu(), want.advantages, rtol=1e-6, atol=0)  # f64 statistics, stored in f32


def test_documents_predict_from_the_second_token_on():
    m = only(pack_documents([((5, 6, 7), 0), ((8, 9), 0)], 100))
    assert m.token_ids.tolist() == [5, 6, 8] and m.target_ids.tolist() == [6, 7, 9]
    assert m.logits_index.tolist() == [0, 1, 2] and m.position_ids.tolist() == [0, 1, 0]
    assert m.segments.tolist() == [[0, 2, 0, 0], [2, 1, 0, 0]]
    assert m.sequence_index.tolist() == [0, 0, 1] and m.num_sequences == 2
    assert m.advantages is None


def test_a_documents_prompt_is_read_but_not_predicted():
    m = only(pack_documents([((5, 6, 7, 8), 2), ((1, 2), 1)], 100))
    assert m.token_ids.tolist() == [5, 6, 7, 1]
    assert m.target_ids.tolist() == [7, 8, 2] and m.logits_index.tolist() == [1, 2, 3]


def test_documents_are_cut_by_the_budget_and_never_split():
    documents = [((1,) * n, 0) for n in (4, 4, 4, 9, 2)]
    assert [m.num_sequences for m in pack_documents(documents, 8)] == [2, 1, 1, 1]


@pytest.mark.parametrize("document", [((5,), 0), ((), 0), ((5, 6), 2)])
def test_a_document_without_anything_to_predict_is_refused(document: tuple[tuple[int, ...], int]):
    with pytest.raises(ValueError, match="needs a token to predict"):
        pack_documents([document], 8)


@pytest.mark.parametrize("is_rl", [True, False])
def test_an_idle_microbatch_has_one_token_and_no_loss(is_rl: bool):
    like = packed([hand_made_group(0, 3, [2])], 9) if is_rl else pack_documents([((5, 6, 7), 0)], 9)
    idle = idle_microbatch(like[0])
    assert (idle.num_tokens, idle.num_loss_tokens, idle.num_sequences) == (1, 0, 0)
    assert (idle.advantages is not None) == is_rl
    plan_segments(idle.segments, idle.num_tokens)
