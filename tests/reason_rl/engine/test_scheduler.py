"""The block pool and the scheduler under random work: no block is lost or allocated twice, and all work ends."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reason_rl.engine.blocks import BlockPool
from reason_rl.engine.scheduler import Prompt, Scheduler, Sequence, num_blocks_for
from tests.reason_rl.tiny import problem


def check_accounts(scheduler: Scheduler, prompts: list[Prompt]) -> None:
    """Every block but 0 is free, or belongs to one running prompt or to one running sequence."""
    owned = [b for s in scheduler.running for b in s.blocks] + [b for p in prompts if p.num_running for b in p.blocks]
    assert len(set(owned)) == len(owned) and 0 not in owned
    assert len(owned) + scheduler.pool.num_free == scheduler.pool.num_blocks - 1
    assert all(not s.blocks for s in scheduler.waiting)
    for prompt in prompts:
        assert prompt.num_running == sum(s.prompt is prompt for s in scheduler.running)
        assert len(prompt.blocks) == (num_blocks_for(prompt.length) if prompt.num_running else 0)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 5)), min_size=1, max_size=6), st.integers(1, 8),
       st.integers(0, 12), st.integers(0, 10**6))
def test_random_work_loses_no_block_and_ends(groups: list[tuple[int, int]], max_num_seqs: int, spare: int, seed: int):
    """In the engine's order: admit, grow, some tokens each, some finish. `spare`: blocks beyond the smallest pool."""
    rng, max_tokens = random.Random(f"{seed}/scheduler"), 40
    prompts = [Prompt(problem(i, length)) for i, (length, _) in enumerate(groups)]
    longest = max(length for length, _ in groups)
    scheduler = Scheduler(BlockPool(1 + num_blocks_for(longest) + num_blocks_for(max_tokens) + spare), max_num_seqs)
    sequences = [Sequence(prompt, i, 0) for prompt, (_, size) in zip(prompts, groups, strict=True) for i in range(size)]
    for sequence in sequences:
        scheduler.add(sequence)
    turns = 0
    while scheduler.has_work:
        admitted = scheduler.admit()
        assert len(scheduler.running) <= max_num_seqs and scheduler.running
        check_accounts(scheduler, prompts)
        for sequence in admitted:
            sequence.prompt.is_cached = True
        for turn in range(2):
            horizon = rng.choice((1, 4, 16)) if turn else 1
            if horizon > 1:
                scheduler.reserve_ahead(horizon, num_blocks_for(max_tokens))
                check_accounts(scheduler, prompts)
            for sequence in scheduler.running[:] if turn else [s for s in admitted if not s.token_ids]:
                room = scheduler.room(sequence) if turn else 1
                assert room >= 1 and len(sequence.blocks) <= num_blocks_for(max_tokens)
                sequence.token_ids += [1] * min(horizon, room, max_tokens - len(sequence.token_ids))
                if len(sequence.token_ids) == max_tokens or rng.random() < 0.03:
                    scheduler.finish(sequence)
            if not turn:
                scheduler.grow()
                check_accounts(scheduler, prompts)
                assert all(len(s.blocks) >= num_blocks_for(len(s.token_ids)) for s in scheduler.running)
        check_accounts(scheduler, prompts)
        turns += 1
        assert turns < 10_000
    assert scheduler.pool.num_free == scheduler.pool.num_blocks - 1
    assert not scheduler.has_work and not any(s.blocks for s in sequences)
    assert not any(p.is_cached or p.blocks for p in prompts)


def test_a_block_is_held_ahead_only_where_it_is_needed_and_plenty_are_free():
    scheduler = Scheduler(BlockPool(1 + 12), 8)
    sequences = [Sequence(Prompt(problem(i, 5)), i, 0, token_ids=[1] * length) for i, length in enumerate((2, 14, 16))]
    for sequence in sequences:
        scheduler.add(sequence)
    scheduler.admit()
    assert [scheduler.room(s) for s in sequences] == [15, 3, 1]
    scheduler.reserve_ahead(4, 8)
    assert [scheduler.room(s) for s in sequences] == [15, 19, 17]
    free = scheduler.pool.num_free
    scheduler.reserve_ahead(64, 2)
    assert [len(s.blocks) for s in sequences] == [2, 2, 2]  # never more than max_tokens need
    assert scheduler.pool.num_free == free - 1
    scheduler.pool.allocate(scheduler.pool.num_free - 3)
    scheduler.reserve_ahead(64, 8)
    assert scheduler.pool.num_free == 3  # one for each running sequence stays free


def test_sequences_are_admitted_in_order_and_the_youngest_is_preempted():
    scheduler = Scheduler(BlockPool(1 + 5), 8)
    sequences = [Sequence(Prompt(problem(i, 5)), 0, i) for i in range(3)]
    for sequence in sequences:
        scheduler.add(sequence)
    assert scheduler.admit() == sequences[:2]  # two blocks each; the third would need two more than the one left
    for sequence in sequences[:2]:
        sequence.token_ids = [1] * 17
    scheduler.grow()  # both want a second block and one is left
    assert scheduler.running == sequences[:1] and list(scheduler.waiting) == [sequences[1], sequences[2]]
    assert scheduler.num_preemptions == 1 and sequences[1].token_ids == [1] * 17


def test_one_more_completion_of_a_running_prompt_needs_no_prompt_blocks():
    prompt = Prompt(problem(0, 40))
    scheduler = Scheduler(BlockPool(1 + 3 + 2), 8)
    for index in range(3):
        scheduler.add(Sequence(prompt, index, index))
    assert len(scheduler.admit()) == 2 and scheduler.pool.num_free == 0


def test_a_prompt_without_running_sequences_forgets_its_keys():
    prompt = Prompt(problem(0, 5))
    scheduler = Scheduler(BlockPool(4), 8)
    scheduler.add(Sequence(prompt, 0, 0))
    (sequence,) = scheduler.admit()
    prompt.is_cached, prompt.last_hidden = True, object()
    scheduler.finish(sequence)
    assert (prompt.is_cached, prompt.last_hidden, prompt.blocks) == (False, None, [])


def test_a_shared_block_is_free_only_after_its_last_holder():
    pool = BlockPool(4)
    blocks = pool.allocate(2)
    pool.fork(blocks)
    pool.free(blocks)
    assert pool.num_free == 1
    pool.free(blocks)
    assert pool.num_free == 3
    assert max(Counter(pool.allocate(3)).values()) == 1


def test_misuse_of_the_pool_is_caught():
    pool = BlockPool(3)
    (block,) = pool.allocate(1)
    pool.free([block])
    for misuse in (lambda: pool.free([block]), lambda: pool.fork([block]), lambda: pool.allocate(3)):
        with pytest.raises(AssertionError):
            misuse()
