"""The claims of test_engine_bits.py on a GPU, where every op of the model has a batch-invariant kernel.

Torch's CUDA kernels promise no bits: if an op has only its reference on CUDA, this file skips and names the op.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels.__main__ import import_ops
from kernels.dispatch import table
from reason_rl.model.transformer import Transformer
from reason_rl.parallel.fsdp import SamplingWeights
from tests.reason_rl.engine.test_engine_bits import BATCHES, LENGTHS, MODELS, generate, outcomes
from tests.reason_rl.tiny import WORLD, make_engine, num_different, problem, sampling, tiny_model

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
NEEDED = ("add_rms_norm", "attention", "linear", "linear_logprob", "moe_experts", "moe_route", "paged_attention", "rms_norm",
          "rope", "sample", "swiglu")


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    import_ops()
    plain = [name for name, _, picked, _ in table(CUDA, request.param) if name in NEEDED and picked == "reference"]
    if plain:
        pytest.skip(f"torch's own kernels promise no bits, and run here for {', '.join(plain)}")
    return request.param


def on_gpu(name: str, dtype: torch.dtype) -> Transformer:
    return tiny_model(MODELS[name], dtype=dtype, scale=5.0).to(CUDA)


@pytest.mark.parametrize("name", ["moe", "dense"])
@pytest.mark.parametrize("num_sequences", BATCHES)
def test_logprobs_of_any_batch_are_the_trainers_in_any_packing(num_sequences: int, name: str, dtype: torch.dtype):
    model = on_gpu(name, dtype)
    groups = generate(model, num_sequences)
    assert [num_different(model, groups, tokens) for tokens in (1 << 20, 150)] == [0, 0]
    assert num_different(model, groups[:11], 1) == 0  # each sequence in a separate pack


@pytest.mark.parametrize("name", MODELS)
def test_logprobs_of_groups_are_the_trainers(name: str, dtype: torch.dtype):
    model = on_gpu(name, dtype)
    groups = generate(model, 64, group_size=16, max_tokens=40)
    assert [num_different(model, groups, tokens) for tokens in (1 << 20, 200)] == [0, 0]


def test_completions_that_cross_a_key_tile_keep_their_bits(dtype: torch.dtype):
    model = on_gpu("moe", dtype)
    groups = make_engine(model).generate([problem(0, 3), problem(1, 100), problem(2, 120)], 2, sampling(170, stop_ids=()), step=0)
    assert [num_different(model, groups, tokens) for tokens in (1 << 20, 1)] == [0, 0]


@pytest.mark.parametrize("options", [{"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}], ids=str)
def test_temperature_and_truncation_are_where_the_trainer_has_them(options: dict[str, float], dtype: torch.dtype):
    model = on_gpu("moe", dtype)
    groups = make_engine(model).generate([problem(i, 9) for i in range(5)], 3, sampling(**options), step=0)
    assert num_different(model, groups, temperature=options.get("temperature", 1.0)) == 0


def test_an_unrelated_long_prefill_changes_no_bit(dtype: torch.dtype):
    model, problems = on_gpu("moe", dtype), [problem(i, 7) for i in range(4)]
    alone = make_engine(model).generate(problems, 2, sampling(), step=0)
    mixed = make_engine(model).generate([*problems, problem(99, 450)], 2, sampling(), step=0)
    assert outcomes(mixed[:4]) == outcomes(alone)


@pytest.mark.parametrize("setting", [{"max_num_seqs": 1}, {"max_num_seqs": 5}, {"prefill_tokens": 1}, {"num_blocks": 13}], ids=str)
def test_completions_do_not_depend_on_the_engines_settings(setting: dict[str, int], dtype: torch.dtype):
    """Few at a time: new prompts enter while others decode. 13 blocks: sequences are preempted and resumed."""
    model = on_gpu("moe", dtype)
    groups = generate(model, 24, group_size=3, **setting)
    assert num_different(model, groups) == 0
    assert outcomes(groups) == outcomes(generate(model, 24, group_size=3))


def test_preemption_changes_no_bit(dtype: torch.dtype):
    model, problems = on_gpu("moe", dtype), [problem(i, LENGTHS[i]) for i in range(6)]
    engine = make_engine(model, num_blocks=16)
    groups = engine.generate(problems, 4, sampling(40, stop_ids=()), step=0)
    assert engine.num_preemptions > 5 and num_different(model, groups) == 0
    assert outcomes(groups) == outcomes(make_engine(model).generate(problems, 4, sampling(40, stop_ids=()), step=0))


def test_the_copy_that_samples_gives_the_trainers_bits(dtype: torch.dtype):
    """In bf16 the engine reads a copy that was cast once; the trainer casts at each use."""
    model = on_gpu("default", dtype)
    weights = SamplingWeights(model, replace(WORLD, device=CUDA, dtype=dtype))
    assert weights.shares_memory == (dtype == torch.float32)
    groups = generate(weights.model, 65)
    assert [num_different(model, groups, tokens) for tokens in (1 << 20, 150)] == [0, 0]
