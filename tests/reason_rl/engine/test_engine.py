"""The engine's contract: its records, its stops, its refusals, and that it computes nothing twice."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from kernels.attention import BLOCK_SIZE
from reason_rl.engine import engine as engine_module
from reason_rl.engine.blocks import BlockPool
from reason_rl.engine.decoders import one_each
from reason_rl.engine.engine import GIB, noise_key
from reason_rl.engine.native_decode import unsupported_reason
from reason_rl.engine.scheduler import Prompt, Scheduler, Sequence, num_blocks_for
from reason_rl.model.scoring import token_logprobs
from reason_rl.model.transformer import Transformer
from reason_rl.records import Problem
from tests.reason_rl.tiny import MOE, VOCAB_SIZE, make_engine, packed, problem, sampling, tiny_model

BYTES_PER_BLOCK = 2 * MOE.num_hidden_layers * MOE.num_key_value_heads * BLOCK_SIZE * MOE.head_dim * 4
"""Keys and values in float32."""


@pytest.fixture(scope="module")
def model() -> Transformer:
    return tiny_model(MOE)


@pytest.fixture
def forwards(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each call of the model."""
    rows: list[int] = []
    inner = model.forward

    def counted(token_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        rows.append(token_ids.numel())
        return inner(token_ids, *args, **kwargs)

    monkeypatch.setattr(model, "forward", counted)
    return rows


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> list[BlockPool]:
    """The pools that `generate` makes."""
    made: list[BlockPool] = []

    def make(num_blocks: int) -> BlockPool:
        made.append(BlockPool(num_blocks))
        return made[-1]

    monkeypatch.setattr(engine_module, "BlockPool", make)
    return made


def test_groups_come_in_the_problems_order_with_all_their_samples(model: Transformer):
    problems = [problem(i, 4 + i) for i in (5, 2, 9)]
    groups = make_engine(model).generate(problems, 3, sampling(), step=0, policy_version=17)
    assert [g.problem for g in groups] == problems and all(g.scores == () for g in groups)
    assert all([c.sample_index for c in g.completions] == [0, 1, 2] for g in groups)
    assert all(c.policy_version == 17 for g in groups for c in g.completions)
    assert all(len(c.token_ids) == len(c.logprobs) == len(c.kept_logmass) for g in groups for c in g.completions)


def test_a_completion_ends_with_its_first_stop_token_or_at_max_tokens(model: Transformer):
    groups = make_engine(model).generate([problem(i, 6) for i in range(20)], 4, sampling(16, stop_ids=(3, 8)), step=0)
    completions = [c for g in groups for c in g.completions]
    assert {c.finish_reason for c in completions} == {"stop", "length"}
    for c in completions:
        assert not {3, 8} & set(c.token_ids[:-1])
        if c.finish_reason == "stop":
            assert c.token_ids[-1] in (3, 8)
        else:
            assert len(c.token_ids) == 16 and c.token_ids[-1] not in (3, 8)


def test_a_stop_token_at_the_last_place_is_a_stop(model: Transformer):
    groups = make_engine(model).generate([problem(i, 6) for i in range(20)], 1, sampling(9, stop_ids=()), step=0)
    free = next(g for g in groups if g.completions[0].token_ids[-1] not in g.completions[0].token_ids[:-1])
    tokens = free.completions[0].token_ids
    (group,) = make_engine(model).generate([free.problem], 1, sampling(9, stop_ids=tokens[-1:]), step=0)
    assert (group.completions[0].token_ids, group.completions[0].finish_reason) == (tokens, "stop")


def test_no_stop_ids_means_max_tokens_each(model: Transformer):
    groups = make_engine(model).generate([problem(0, 6)], 5, sampling(1, stop_ids=()), step=0)
    assert [(len(c.token_ids), c.finish_reason) for c in groups[0].completions] == [(1, "length")] * 5


def test_tokens_stream_as_they_are_sampled_and_cease_after_the_stop(model: Transformer):
    heard: dict[tuple[int, int], list[int]] = {}

    def on_token(p: Problem, index: int, token: int) -> None:
        heard.setdefault((p.problem_id, index), []).append(token)

    groups = make_engine(model, num_blocks=14).generate(
        [problem(i, 20) for i in range(6)], 3, sampling(30, stop_ids=(3,)), step=0, on_token=on_token)
    assert heard == {(g.problem.problem_id, c.sample_index): list(c.token_ids) for g in groups for c in g.completions}


def test_samples_of_a_group_differ_and_steps_and_seeds_differ(model: Transformer):
    def tokens(step: int, seed: int) -> list[tuple[int, ...]]:
        engine = make_engine(model)
        engine.run_seed = seed
        return [c.token_ids for c in engine.generate([problem(0, 9)], 8, sampling(12, stop_ids=()), step=step)[0].completions]

    assert len(set(tokens(0, 7))) == 8
    assert tokens(0, 7) == tokens(0, 7) != tokens(1, 7)
    assert not set(tokens(0, 7)) & set(tokens(0, 8))
    assert len({noise_key(0, 1, 11, 1), noise_key(0, 11, 1, 1), noise_key(1, 1, 1, 11), noise_key(0, 1, 1, 11)}) == 4


def test_sampling_leaves_the_global_generator_alone(model: Transformer):
    before = torch.get_rng_state()
    make_engine(model).generate([problem(0, 9)], 4, sampling(), step=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_first_tokens_are_drawn_in_proportion_to_their_probability(model: Transformer):
    """Chi-square of 2000 draws against the trainer's distribution: a value above 100 on about 30 bins is one in 10^8."""
    p = problem(3, 8)
    groups = make_engine(model).generate([p], 2000, sampling(1, stop_ids=()), step=0)
    counts = Counter(c.token_ids[0] for c in groups[0].completions)
    logprob = {c.token_ids[0]: c.logprobs[0] for c in groups[0].completions}
    expected = {t: 2000 * math.exp(value) for t, value in logprob.items()}
    common = [t for t, e in expected.items() if e >= 5]
    assert len(common) >= 4
    assert sum((counts[t] - expected[t]) ** 2 / expected[t] for t in common) < 100


def test_greedy_takes_the_likeliest_token_each_time(model: Transformer):
    groups = make_engine(model).generate([problem(i, 9) for i in range(4)], 2, sampling(8, (), temperature=0.0), step=0)
    for group in groups:
        assert group.completions[0].token_ids == group.completions[1].token_ids
    (pack,) = packed(groups)
    best = tiny_logits(model, pack).argmax(-1)
    assert best.tolist() == pack.target_ids.tolist()


def tiny_logits(model: Transformer, pack: Any) -> torch.Tensor:
    """f32[N, V] by asking for the logprob of each vocabulary entry."""
    with torch.no_grad():
        columns = [token_logprobs(model, type(pack)(**{**vars(pack), "target_ids": torch.full_like(pack.target_ids, v)}))[0]
                   for v in range(VOCAB_SIZE)]
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize(("cut", "is_kept"), [
    ({"top_k": 3}, lambda rank, before, logprob, top: rank < 3),
    ({"top_p": 0.6}, lambda rank, before, logprob, top: before < 0.6),
    ({"min_p": 0.2}, lambda rank, before, logprob, top: logprob >= top + math.log(0.2)),
])  # fmt: skip
def test_truncation_keeps_to_its_set_and_records_the_kept_mass(model: Transformer, cut: dict[str, float], is_kept: Any):
    groups = make_engine(model).generate([problem(i, 9) for i in range(6)], 4, sampling(8, (), **cut), step=0)
    (pack,) = packed(groups)
    logits = tiny_logits(model, pack).double()
    ordered, order = logits.sort(descending=True, dim=-1)
    assert pack.kept_logmass is not None
    for row in range(pack.num_loss_tokens):
        kept, before = {}, 0.0
        for rank, (value, token) in enumerate(zip(ordered[row].tolist(), order[row].tolist())):
            if is_kept(rank, before, value, ordered[row, 0].item()):
                kept[token] = value
            before += math.exp(value)
        assert int(pack.target_ids[row]) in kept
        # 1e-5: logprobs are f32 of about 1 to 10 nats, summed over up to 40 of them.
        assert float(pack.kept_logmass[row]) == pytest.approx(math.log(sum(map(math.exp, kept.values()))), abs=1e-5)


def test_untruncated_sampling_keeps_all_the_mass(model: Transformer):
    groups = make_engine(model).generate([problem(0, 9)], 4, sampling(), step=0)
    assert {mass for c in groups[0].completions for mass in c.kept_logmass} == {0.0}


def test_a_prompt_is_prefilled_once_for_its_group(model: Transformer, forwards: list[int]):
    problems = [problem(i, 30) for i in range(3)]
    groups = make_engine(model, decoder="ops").generate(problems, 5, sampling(6, stop_ids=()), step=0)
    assert forwards == [90, 15, 15, 15, 15, 15]  # one prefill; the first token needs no decode, the last one no key
    assert sum(len(c.token_ids) for g in groups for c in g.completions) == 90


def test_prefill_passes_keep_to_their_budget(model: Transformer, forwards: list[int]):
    make_engine(model, prefill_tokens=64).generate([problem(i, 30) for i in range(5)], 2, sampling(1), step=0)
    assert forwards == [60, 60, 30]


def test_finished_sequences_leave_the_batch(model: Transformer, forwards: list[int]):
    groups = make_engine(model, decoder="ops").generate([problem(i, 8) for i in range(4)], 4, sampling(20, stop_ids=(3, 8)), step=0)
    decoded = sum(len(c.token_ids) - 1 for g in groups for c in g.completions)
    assert sum(forwards) == 4 * 8 + decoded


def test_a_groups_blocks_are_shared_and_all_are_free_at_the_end(model: Transformer, pools: list[BlockPool]):
    used: list[int] = []
    make_engine(model).generate([problem(0, 33)], 6, sampling(5, stop_ids=()), step=0,
                                on_token=lambda *_: used.append(pools[0].num_blocks - 1 - pools[0].num_free))
    assert max(used) == num_blocks_for(33) + 6  # three blocks for the prompt, one for each completion
    assert pools[0].num_free == pools[0].num_blocks - 1


@pytest.mark.parametrize("num_blocks", [0, 12, 9])
def test_no_block_is_lost_under_preemption(model: Transformer, pools: list[BlockPool], num_blocks: int):
    engine = make_engine(model, num_blocks=num_blocks)
    engine.generate([problem(i, 10 + 13 * i) for i in range(4)], 4, sampling(60, stop_ids=(3,)), step=0)
    assert pools[0].num_free == pools[0].num_blocks - 1
    assert (engine.num_preemptions > 0) == (num_blocks > 0)


def test_an_ample_cache_never_preempts(model: Transformer):
    engine = make_engine(model, max_num_seqs=7)
    engine.generate([problem(i, 17) for i in range(9)], 3, sampling(40, stop_ids=()), step=0)
    assert engine.num_preemptions == 0


def test_the_cache_is_sized_by_the_longest_sequence_and_not_by_the_models_context(pools: list[BlockPool]):
    for max_position_embeddings in (128, 40_960):
        model = tiny_model(replace(MOE, max_position_embeddings=max_position_embeddings))
        make_engine(model, max_num_seqs=4).generate([problem(i, 20 + i) for i in range(3)], 4, sampling(50, stop_ids=()), step=0)
    # Four completions of 4 blocks, three prompts of 2, one block in reserve, and the null block.
    assert [pool.num_blocks for pool in pools] == [4 * 4 + 3 * 2 + 1 + 1] * 2


@pytest.mark.parametrize("decoder", ["ops", "native"])
def test_a_cache_bounded_in_bytes_preempts_and_draws_the_same_tokens(model: Transformer, pools: list[BlockPool], decoder: str):
    if decoder == "native" and unsupported_reason(model):
        pytest.skip(unsupported_reason(model))
    problems = [problem(i, 10 + 13 * i) for i in range(4)]
    ample, bounded = make_engine(model, decoder=decoder), make_engine(model, decoder=decoder, cache_gib=20 * BYTES_PER_BLOCK / GIB)
    whole, part = (engine.generate(problems, 4, sampling(60, stop_ids=(3,)), step=0) for engine in (ample, bounded))
    assert pools[0].num_blocks > 60 and pools[1].num_blocks == 20 and pools[1].num_free == 19
    assert bounded._cache is not None
    assert bounded._cache.keys.nbytes + bounded._cache.values.nbytes == 20 * BYTES_PER_BLOCK
    assert ample.num_preemptions == 0 < bounded.num_preemptions
    assert whole == part


def test_one_sequence_has_room_however_small_the_bound(model: Transformer, pools: list[BlockPool]):
    groups = make_engine(model, cache_gib=1e-9).generate([problem(i, 100) for i in range(2)], 3, sampling(24, ()), step=0)
    assert pools[0].num_blocks == 1 + 7 + 2 and all(len(c.token_ids) == 24 for g in groups for c in g.completions)


@pytest.fixture
def no_forward(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("work has started")

    monkeypatch.setattr(model, "forward", refuse)
    yield


@pytest.mark.usefixtures("no_forward")
def test_what_cannot_fit_is_refused_before_any_work(model: Transformer):
    with pytest.raises(ValueError, match=r"500 tokens.*max_tokens = 24.*max_position_embeddings = 512"):
        make_engine(model).generate([problem(0, 3), problem(1, 500)], 2, sampling(), step=0)
    with pytest.raises(ValueError, match=r"prompt of 100 tokens.*needs 10 KV blocks of 16.*num_blocks = 9"):
        make_engine(model, num_blocks=9).generate([problem(0, 100)], 2, sampling(), step=0)
    with pytest.raises(ValueError, match="at least one token"):
        make_engine(model).generate([problem(0, 3), problem(1, 0)], 2, sampling(), step=0)


def test_the_smallest_cache_that_is_accepted_suffices(model: Transformer):
    groups = make_engine(model, num_blocks=10).generate([problem(i, 100) for i in range(2)], 3, sampling(24, ()), step=0)
    assert all(len(c.token_ids) == 24 for g in groups for c in g.completions)


def test_no_problems_give_no_groups(model: Transformer):
    assert make_engine(model).generate([], 4, sampling(), step=0) == []


def test_broken_weights_are_an_error_and_not_a_token():
    model = tiny_model(MOE)
    with torch.no_grad():
        model.norm.weight[3] = torch.nan
    with pytest.raises(ValueError, match="NaN or inf"):
        make_engine(model).generate([problem(0, 4)], 2, sampling(), step=0)


def test_a_token_that_was_not_drawn_stops_the_engine_where_it_is_read():
    """On a GPU `sample` does not sync to check the logits: for broken ones it returns -1."""
    tokens, rest = torch.tensor([3, -1, 5]), torch.zeros(3)
    assert one_each(tokens.abs(), rest, rest).tokens == [[3], [1], [5]]
    with pytest.raises(ValueError, match="the logits of row 1 hold NaN or inf"):
        one_each(tokens, rest, rest)


def test_a_sequence_needs_no_more_blocks_than_its_tokens():
    prompt = Prompt(problem(0, BLOCK_SIZE))
    scheduler = Scheduler(BlockPool(4), 8)
    sequence = Sequence(prompt, 0, 0)
    scheduler.add(sequence)
    assert scheduler.admit() == [sequence]
    for _ in range(BLOCK_SIZE):
        sequence.token_ids.append(1)
        scheduler.grow()
    assert (len(prompt.blocks), len(sequence.blocks), scheduler.pool.num_free) == (1, 1, 1)
    sequence.token_ids.append(1)
    scheduler.grow()
    assert len(sequence.blocks) == 2
