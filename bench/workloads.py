"""The workloads of bench.train_step and bench.rollout, and the model of each.

    W1       16 prompts of   6 tokens x  8 completions of exactly  64 tokens    small model
    W2        4 prompts of 256 tokens x 16 completions of exactly 128 tokens    small model
    default  16 prompts of  16 tokens x 16 completions of exactly  80 tokens    default preset
    1b       16 prompts of 512 tokens x 16 completions of exactly 512 tokens    large model

    small model  V64 D128 I128 L4 H4 K2 C32 E8 top-2, tied, Qwen3-MoE: 1.78 M parameters, 0.6 M active
    large model  V151936 D2048 I1024 L16 H16 K4 C128 E32 top-4, tied: 3.7 B parameters, 0.9 B active; training
                 takes 70 GB

Weights and prompts are random, and no token ends a completion. The reward is a completion's number of
distinct characters.
"""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass, replace

import torch

from bench.harness import copy_gbytes
from reason_rl.config import Config, load_config
from reason_rl.data import Tokenizer, char_tokenizer
from reason_rl.model.transformer import Transformer
from reason_rl.parallel.world import init_world
from reason_rl.records import Problem
from reason_rl.stages.base import StageStart
from reason_rl.stages.grpo import Grpo

WORKLOADS = {"W1": (16, 6, 8, 64), "W2": (4, 256, 16, 128), "default": (16, 16, 16, 80), "1b": (16, 512, 16, 512)}
"""(prompts, tokens per prompt, completions per prompt, tokens per completion)"""
PEERS_KNOW = ("W1", "W2")
MODELS = {
    "default": (),
    "1b": ("--model.num_hidden_layers=16", "--model.hidden_size=2048", "--model.num_attention_heads=16",
           "--model.num_key_value_heads=4", "--model.head_dim=128", "--model.num_experts=32",
           "--model.num_experts_per_tok=4", "--model.moe_intermediate_size=1024", "--optim.microbatch_tokens=16384")}
"""Overrides by workload; workloads that are not listed have PEERS_MODEL."""
PEERS_MODEL = ("--model.num_hidden_layers=4", "--model.moe_intermediate_size=128")
VOCAB_SIZES = {"1b": 151936}


def workload_config(
    workload: str, dtype: str, device: str, exact: str = "auto", decoder: str = "auto", with_graphs: bool = False
) -> Config:
    num_prompts, prompt_tokens, group_size, new_tokens = WORKLOADS[workload]
    return load_config(None, [
        f"--rl.prompts_per_step={num_prompts}", f"--rl.group_size={group_size}", "--rl.num_minibatches=1",
        "--rl.drop_no_signal=false", f"--sampling.max_tokens={new_tokens}",
        f"--model.max_position_embeddings={prompt_tokens + new_tokens}",
        "--model.expert_bias=false", "--optim.lr=1e-6",
        "--reward.accuracy=0", "--reward.format=0", "--reward.custom=bench.rewards:distinct_characters",
        f"--run.dtype={dtype}", f"--run.device={device}", f"--run.exact={exact}",
        f"--engine.decoder={decoder}", f"--engine.cuda_graph_batch={num_prompts * group_size if with_graphs else 0}",
        f"--engine.max_num_seqs={num_prompts * group_size}", "--optim.microbatch_tokens=65536",
        *MODELS.get(workload, PEERS_MODEL)])


@dataclass(frozen=True)
class RandomStart(StageStart):
    """A StageStart with random weights instead of a folder's."""

    vocab_size: int = 0

    def load(self) -> Transformer:
        return Transformer(self.config.model, self.vocab_size).initialise(0)


@dataclass(frozen=True)
class RandomProblems:
    """Prompts of random characters, with the method of `Problems` that a GRPO step calls."""

    tokenizer: Tokenizer
    prompt_tokens: int

    def train(self, step: int, count: int, round: int = 0, exclude: Collection[int] = ()) -> list[Problem]:
        rng = random.Random(f"bench/{step}/{round}")
        prompts = ["".join(rng.choices("0123456789+", k=self.prompt_tokens)) for _ in range(count)]
        return [Problem(step * count + i, "bench", text, tuple(self.tokenizer.encode(text)), "") for i, text in enumerate(prompts)]


def workload_stage(config: Config, workload: str) -> Grpo:
    """The GRPO stage of a run, without stop tokens."""
    tokenizer, world = char_tokenizer(), init_world(config.run)
    problems = RandomProblems(tokenizer, WORKLOADS[workload][1])
    stage = Grpo(RandomStart(config, world, tokenizer, problems, offset=0, folder=None, checkpoint=None,  # type: ignore[arg-type]
                             vocab_size=VOCAB_SIZES.get(workload, tokenizer.vocab_size)))
    stage.sampling = replace(stage.sampling, stop_ids=())
    return stage


def decode_floor_s(model: Transformer, workload: str, bytes_per_s: float) -> float:
    """Least seconds of a rollout's decode steps, by bytes read. Each step reads the weights once (of experts,
    those that some sequence can use), each sequence's own keys and values, and each prompt's once per group.
    Prefill, which gives the first tokens, is left out."""
    # Bytes of weights per step.
    num_prompts, prompt_tokens, group_size, new_tokens = WORKLOADS[workload]
    config, num_rows, num_steps = model.config, num_prompts * group_size, new_tokens - 1
    used_share = min(1.0, num_rows * config.num_experts_per_tok / config.num_experts) if config.num_experts > 1 else 1.0
    weight_bytes = sum(
        parameter.nbytes * (used_share if parameter.dim() == 3 else 1.0)  # the experts' are stacked
        for name, parameter in model.named_parameters() if config.tie_word_embeddings or not name.startswith("embedding"))

    # Bytes of keys and values, over all steps.
    key_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.compute_dtype.itemsize
    keys = num_steps * num_prompts * prompt_tokens + num_rows * num_steps * (num_steps + 1) // 2
    return (num_steps * weight_bytes + keys * key_bytes) / bytes_per_s


def gpu_figures(stage: Grpo, workload: str, rollout_s: float) -> dict[str, float]:
    """{} on a CPU, whose caches may hold the weights."""
    device = stage.world.device
    if device.type != "cuda":
        return {}
    peak = torch.cuda.max_memory_allocated(device) / 2**20  # before the copy's own memory
    floor_s = decode_floor_s(stage.policy.sampling_model, workload, copy_gbytes(device) * 1e9)
    return {"percent_of_decode_floor": 100 * floor_s / rollout_s, "peak_gpu_mb": peak}
