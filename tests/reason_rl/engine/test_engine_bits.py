"""The main claim of this project: the logprobs that the engine records equal the trainer's, bit for bit.

No test here has a tolerance: values are compared as integers. A test that fails on another machine or another
torch has found a reduction order that depends on the batch (see kernels/linear/reference.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from reason_rl.config import ModelConfig
from reason_rl.model.scoring import token_logprobs
from reason_rl.model.transformer import Transformer
from reason_rl.parallel.fsdp import SamplingWeights
from reason_rl.records import Group
from tests.reason_rl.tiny import (
    CPU,
    DENSE,
    MOE,
    WORLD,
    different_bits,
    make_engine,
    num_different,
    packed,
    problem,
    sampling,
    tiny_model,
    trainer_logprobs,
)

MODELS = {
    "moe": MOE, "dense": DENSE, "default": ModelConfig(),
    "shared sigmoid": replace(MOE, num_shared_experts=1, router_score="sigmoid", norm_topk_prob=False),
    "biases, half a head turned": replace(DENSE, attention_bias="qkv", partial_rotary_factor=0.5, qk_norm="head"),
    "all biases, qk-norm over all heads": replace(MOE, attention_bias="all", qk_norm="full"),
    "first layer dense, scaled routes": replace(
        MOE, num_hidden_layers=3, num_dense_layers=1, intermediate_size=50, router_score="sigmoid", num_shared_experts=1,
        routed_scaling_factor=2.5),
    "scaled rope": replace(MOE, rope_scaling='{"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}'),
}
BATCHES = (1, 2, 3, 7, 8, 9, 11, 64, 65, 256)
# Just below and above a block (16) and a key tile (128), and far from both.
LENGTHS = (5, 15, 16, 17, 1, 31, 127, 128, 129, 40, 112, 113)


def generate(model: Transformer, num_sequences: int, group_size: int = 1, max_tokens: int = 20, **engine: int) -> list[Group]:
    problems = [problem(i, LENGTHS[i % len(LENGTHS)]) for i in range(-(-num_sequences // group_size))]
    return make_engine(model, **engine).generate(problems, group_size, sampling(max_tokens), step=0)


def outcomes(groups: Sequence[Group]) -> list[tuple[object, ...]]:
    """Everything that the engine recorded, by (problem, sample): tokens, logprobs, reasons."""
    return sorted((g.problem.problem_id, c.sample_index, c.token_ids, c.logprobs, c.kept_logmass, c.finish_reason)
                  for g in groups for c in g.completions)


@pytest.fixture(scope="module")
def moe() -> Transformer:
    return tiny_model(MOE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["moe", "dense"])
@pytest.mark.parametrize("num_sequences", BATCHES)
def test_logprobs_of_any_batch_are_the_trainers_in_any_packing(name: str, num_sequences: int, dtype: torch.dtype):
    model = tiny_model(MODELS[name], dtype=dtype)
    groups = generate(model, num_sequences)
    # Microbatches of at most 2^20 tokens (all in one), of 150, and with each sequence alone.
    assert [num_different(model, groups, tokens) for tokens in (1 << 20, 150)] == [0, 0]
    assert num_different(model, groups[:11], 1) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_logprobs_of_groups_are_the_trainers(name: str, dtype: torch.dtype):
    model = tiny_model(MODELS[name], dtype=dtype, scale=5.0)
    groups = generate(model, 36, group_size=4, max_tokens=40)
    assert [num_different(model, groups, tokens) for tokens in (1 << 20, 200)] == [0, 0]


def test_completions_that_cross_the_key_tile_keep_their_bits(moe: Transformer):
    """Completions of more than 128 tokens: in cache and pack, tiles begin at the completion's first token."""
    problems = [problem(0, 3), problem(1, 100), problem(2, 120)]
    groups = make_engine(moe).generate(problems, 2, sampling(170, stop_ids=()), step=0)
    assert [num_different(moe, groups, tokens) for tokens in (1 << 20, 1)] == [0, 0]


def test_a_temperature_is_applied_at_the_same_point(moe: Transformer):
    groups = make_engine(moe).generate([problem(i, 9) for i in range(5)], 3, sampling(temperature=0.7), step=0)
    assert num_different(moe, groups, temperature=0.7) == 0


@pytest.mark.parametrize("cut", [{"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}])
def test_truncated_sampling_records_the_full_softmax(moe: Transformer, cut: dict[str, float]):
    groups = make_engine(moe).generate([problem(i, 9) for i in range(5)], 3, sampling(**cut), step=0)
    assert num_different(moe, groups) == 0
    assert any(mass < 0 for g in groups for c in g.completions for mass in c.kept_logmass)


def test_the_packing_does_not_change_the_trainers_own_bits(moe: Transformer):
    groups = generate(moe, 48, group_size=4)
    whole, cut, single = (trainer_logprobs(moe, packed(groups, n)) for n in (1 << 20, 120, 1))
    assert different_bits(whole, cut) == different_bits(whole, single) == 0


def test_an_unrelated_long_prefill_changes_no_bit(moe: Transformer):
    problems = [problem(i, 7) for i in range(4)]
    alone = make_engine(moe).generate(problems, 2, sampling(), step=0)
    mixed = make_engine(moe).generate([*problems, problem(99, 450)], 2, sampling(), step=0)
    assert outcomes(mixed[:4]) == outcomes(alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_prefill_in_the_middle_of_decoding_changes_no_bit(dtype: torch.dtype):
    """Three at a time: new prompts enter while older sequences decode."""
    moe = tiny_model(MOE, dtype=dtype)
    groups = generate(moe, 12, max_num_seqs=3)
    assert num_different(moe, groups) == 0
    assert outcomes(groups) == outcomes(generate(moe, 12))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_preemption_changes_no_bit(dtype: torch.dtype):
    moe = tiny_model(MOE, dtype=dtype)
    problems = [problem(i, LENGTHS[i]) for i in range(6)]
    engine = make_engine(moe, num_blocks=16)
    groups = engine.generate(problems, 4, sampling(40, stop_ids=()), step=0)
    assert engine.num_preemptions > 5
    assert num_different(moe, groups) == 0
    assert outcomes(groups) == outcomes(make_engine(moe).generate(problems, 4, sampling(40, stop_ids=()), step=0))


@pytest.mark.parametrize("setting", [{"max_num_seqs": 1}, {"max_num_seqs": 5}, {"prefill_tokens": 1}, {"num_blocks": 13}])
def test_completions_do_not_depend_on_the_engines_settings(moe: Transformer, setting: dict[str, int]):
    assert outcomes(generate(moe, 24, group_size=3, **setting)) == outcomes(generate(moe, 24, group_size=3))


def test_completions_do_not_depend_on_order_batch_or_group_size(moe: Transformer):
    problems = [problem(i, LENGTHS[i]) for i in range(8)]
    together = make_engine(moe).generate(problems, 3, sampling(), step=0)
    turned = make_engine(moe).generate(problems[::-1], 3, sampling(), step=0)
    alone = [make_engine(moe).generate([p], 3, sampling(), step=0)[0] for p in problems]
    larger = make_engine(moe).generate(problems, 5, sampling(), step=0)
    assert outcomes(turned) == outcomes(alone) == outcomes(together)
    assert [g.completions[:3] for g in larger] == [g.completions for g in together]


@pytest.mark.long  # slow on busy cores: two threads wait for each other
def test_completions_do_not_depend_on_the_number_of_threads(moe: Transformer):
    torch.set_num_threads(1)
    one = generate(moe, 12)
    torch.set_num_threads(2)
    two = generate(moe, 12)
    assert [g.completions[0].token_ids for g in two] == [g.completions[0].token_ids for g in one]
    assert num_different(moe, two) == 0


def test_the_engine_samples_from_the_weights_as_they_are_now(moe: Transformer):
    """No key of an older policy is kept after its `generate`."""
    model = tiny_model(MOE)
    engine = make_engine(model)
    problems = [problem(i, 20) for i in range(4)]
    before = engine.generate(problems, 2, sampling(), step=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    after = engine.generate(problems, 2, sampling(), step=0)
    assert outcomes(after) != outcomes(before) and num_different(model, after) == 0
    assert outcomes(after) == outcomes(make_engine(model).generate(problems, 2, sampling(), step=0))


def test_padding_rows_are_not_routed(moe: Transformer):
    """`linear` pads few rows; the experts' loads must count real tokens alone."""
    (pack,) = packed(generate(moe, 1))
    router = token_logprobs(moe, pack, with_stats=True)[2]
    assert router is not None
    assert router.expert_counts.sum(1).tolist() == [pack.num_tokens * MOE.num_experts_per_tok] * MOE.num_hidden_layers


@pytest.mark.parametrize("name", ["moe", "dense", "default", "all biases, qk-norm over all heads",
                                  "first layer dense, scaled routes"])
@pytest.mark.parametrize("num_sequences", [1, 3, 9, 65])
def test_bf16_rollout_weights_give_the_trainers_bits(name: str, num_sequences: int):
    """The copy is cast once, the trainer casts at each use: the same rounding, also in the experts."""
    model = tiny_model(MODELS[name], dtype=torch.bfloat16, scale=5.0)
    weights = SamplingWeights(model, replace(WORLD, size=2, dtype=torch.bfloat16))
    assert not weights.shares_memory
    groups = generate(weights.model, num_sequences)
    assert [num_different(model, groups, tokens) for tokens in (1 << 20, 150)] == [0, 0]


def test_a_rollout_copy_follows_the_trainer_only_on_refresh():
    model = tiny_model(dtype=torch.bfloat16)
    weights = SamplingWeights(model, replace(WORLD, size=2, dtype=torch.bfloat16))
    with torch.no_grad():
        model.embedding.weight.mul_(1.5)
        model.blocks[0].mlp.expert_bias += 1.0  # type: ignore[operator, union-attr]
    assert num_different(model, generate(weights.model, 4)) > 0
    weights.refresh()
    assert num_different(model, generate(weights.model, 4)) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_process_samples_from_the_trainers_own_tensors(dtype: torch.dtype):
    model = tiny_model(dtype=dtype)
    assert SamplingWeights(model, replace(WORLD, dtype=dtype)).model is model and model.embedding.weight.device == CPU
