"""Small models, problems and graded groups that several tests share, built without a tokenizer or a task."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import torch

from reason_rl.config import EngineConfig, ModelConfig
from reason_rl.engine import Engine
from reason_rl.model.scoring import token_logprobs
from reason_rl.model.transformer import MoE, Transformer
from reason_rl.parallel.world import World
from reason_rl.records import Completion, Group, Microbatch, Problem, SamplingParams, Score
from reason_rl.reward import Grader
from reason_rl.rl.packing import Sample, pack_samples

VOCAB_SIZE = 40
CPU = torch.device("cpu")
WORLD = World(0, 1, CPU, torch.float32)
MOE = ModelConfig(family="qwen3_moe", num_hidden_layers=2, hidden_size=48, num_attention_heads=4, num_key_value_heads=2,
                  head_dim=16, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=40, expert_bias=True,
                  max_position_embeddings=512)
DENSE = replace(MOE, num_experts=1, num_experts_per_tok=1, intermediate_size=80, tie_word_embeddings=False, qk_norm="none",
                family="qwen3")


def tiny_model(config: ModelConfig = MOE, seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 6.0) -> Transformer:
    """Weights `scale` times the usual: a fresh model is nearly uniform, so that no test of sampling could fail."""
    model = Transformer(config, VOCAB_SIZE, dtype).initialise(seed)
    with torch.no_grad():
        for index, (name, parameter) in enumerate(model.named_parameters()):
            if parameter.dim() > 1:
                parameter *= scale
            elif name.endswith("bias"):
                parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed * 100 + index))
        for layer, block in enumerate(model.blocks):
            if isinstance(block.mlp, MoE):  # biases that steer the choice, as after a pretraining
                generator = torch.Generator().manual_seed(seed * 100 + layer)
                block.mlp.expert_bias += 0.1 * torch.randn(config.num_experts, generator=generator)
    return model


def problem(problem_id: int, length: int, seed: int = 0) -> Problem:
    rng = random.Random(f"{seed}/prompt/{problem_id}")
    return Problem(problem_id, "test", f"prompt {problem_id}", tuple(rng.randrange(VOCAB_SIZE) for _ in range(length)), "0")


def sampling(max_tokens: int = 24, stop_ids: tuple[int, ...] = (0,), **values: float) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, stop_ids=stop_ids, **values)  # type: ignore[arg-type]


def make_engine(model: Transformer, **values: int | float | str) -> Engine:
    return Engine(model, replace(EngineConfig(), **values), run_seed=7)  # type: ignore[arg-type]


def graded(group: Group, values: Sequence[float] | None = None) -> Group:
    rewards = [float(i % 2) for i in range(len(group.completions))] if values is None else values
    return group.with_scores(tuple(Score(value, {"accuracy": value}) for value in rewards))


def grade_group(group: Group, grader: Grader) -> Group:
    """The group with the `Score` of each completion, once all are graded."""
    pending = [grader.submit(group.problem, completion) for completion in group.completions]
    return group.with_scores(tuple(one.score() for one in pending))


def samples_of(groups: Sequence[Group]) -> list[Sample]:
    """All completions of all groups."""
    return [Sample(group, number, index) for number, group in enumerate(groups) for index in range(len(group.completions))]


def packed(groups: Sequence[Group], max_tokens: int = 1 << 20, advantage: float = 1.0) -> list[Microbatch]:
    """All completions of all groups, their advantages alternating in sign and differing in size."""
    most = max(len(group.completions) for group in groups)
    values = torch.tensor([[advantage * (-1) ** index * (1 + 0.25 * index) for index in range(most)]] * len(groups))
    return pack_samples(samples_of(groups), values, max_tokens)


def hand_made_group(problem_id: int, prompt_length: int, lengths: Sequence[int], finish: str = "stop") -> Group:
    """Completions of the given lengths with made-up tokens and logprobs."""
    rng = random.Random(f"completions/{problem_id}")
    return Group(problem(problem_id, prompt_length), tuple(
        Completion(tuple(rng.randrange(VOCAB_SIZE) for _ in range(length)), tuple(-rng.random() * 3 for _ in range(length)),
                   (0.0,) * length, finish, 0, index)  # type: ignore[arg-type]
        for index, length in enumerate(lengths)))


def trainer_logprobs(model: Transformer, packs: Sequence[Microbatch], temperature: float = 1.0) -> torch.Tensor:
    """The trainer's logprobs of all loss tokens, with gradients on as in an update."""
    device = model.head_weight.device
    return torch.cat([token_logprobs(model, pack.to(device), temperature)[0].detach() for pack in packs]).cpu()


def different_bits(a: torch.Tensor, b: torch.Tensor) -> int:
    """How many f32 entries differ, compared as integers."""
    assert a.shape == b.shape and a.dtype == b.dtype == torch.float32
    return int((a.view(torch.int32) != b.view(torch.int32)).sum())


def num_different(model: Transformer, groups: Sequence[Group], max_tokens: int = 1 << 20, temperature: float = 1.0) -> int:
    """How many tokens have a recorded logprob that differs in any bit from the trainer's, computed in
    microbatches of at most `max_tokens`."""
    packs = packed(groups, max_tokens)
    recorded = torch.cat([pack.rollout_logprobs for pack in packs if pack.rollout_logprobs is not None])
    return different_bits(recorded, trainer_logprobs(model, packs, temperature))
