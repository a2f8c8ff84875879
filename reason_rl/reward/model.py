"""A reward model: our own transformer with a score head, as a kind of the verifier service.

Reads a checkpoint folder (config.json, model.safetensors, tokenizer.json) that also has
reward_head.safetensors: "weight" f32[D] and "bias" f32[1]. The score of prompt and completion, from 0 to 1,
is
    sigmoid(hidden of the last token . weight + bias)
Runs in its own worker, on the CPU, in float32; the worker loads the weights at its start. Left out: training
one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from reason_rl.answers.verdict import Verdict, graded, ungradable
from reason_rl.data import Tokenizer
from reason_rl.model.scoring import packed_hidden
from reason_rl.model.transformer import Transformer
from reason_rl.model.weights import load_model
from reason_rl.records import ConfigError, Microbatch

HEAD_FILE = "reward_head.safetensors"


@dataclass(frozen=True)
class RewardModel:
    model: Transformer
    tokenizer: Tokenizer
    weight: torch.Tensor
    """f32[D]"""
    bias: torch.Tensor
    """f32[1]"""

    def encode(self, text: str) -> torch.Tensor:
        """i64[T]. Raises ValueError for a character without a token, and for too long a text."""
        token_ids = self.tokenizer.encode(text)
        if not 0 < len(token_ids) <= self.model.config.max_position_embeddings:
            raise ValueError(f"the reward model reads 1 to {self.model.config.max_position_embeddings} tokens, "
                             f"got {len(token_ids)}")
        return torch.tensor(token_ids)

    @torch.no_grad()
    def score(self, token_ids: torch.Tensor) -> float:
        length = len(token_ids)
        # One sequence without targets; the head reads its last hidden state.
        hidden, _ = packed_hidden(self.model, Microbatch(
            token_ids=token_ids, position_ids=torch.arange(length, dtype=torch.int32),
            segments=torch.tensor([[0, length, 0, 0]], dtype=torch.int32), logits_index=torch.tensor([length - 1]),
            target_ids=torch.zeros(0, dtype=torch.int64), sequence_index=torch.zeros(0, dtype=torch.int32), num_sequences=1))
        return float(torch.sigmoid(hidden[0].float() @ self.weight + self.bias))  # [D] @ [D]


@lru_cache(maxsize=1)
def load_reward_model(folder: str) -> RewardModel:
    model, path = load_model(Path(folder)), Path(folder) / HEAD_FILE
    if not path.is_file():
        raise ConfigError(f"{folder} is not a reward model: it has no {HEAD_FILE}")
    try:
        head = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} is damaged: {error}") from error
    expected = {"weight": (model.config.hidden_size,), "bias": (1,)}
    found = {name: tuple(tensor.shape) for name, tensor in head.items()}
    if found != expected:
        raise ConfigError(f"{path}: expected {expected}, got {found}")
    return RewardModel(model.eval(), Tokenizer.load(folder), head["weight"].float(), head["bias"].float())


def save_head(folder: str | Path, weight: torch.Tensor, bias: torch.Tensor) -> None:
    """Adds a score head to a checkpoint folder, which makes it a reward model. weight: [D], bias: [1]."""
    head = {"weight": weight, "bias": bias}
    save_file({name: tensor.detach().float().contiguous() for name, tensor in head.items()}, Path(folder) / HEAD_FILE)


def grade_by_model(request: Mapping[str, Any], folder: str) -> Verdict:
    """request: "problem" and "completion", the text that continues the prompt."""
    torch.set_num_threads(1)
    model = load_reward_model(folder)
    try:
        token_ids = model.encode(request["problem"].prompt + request["completion"])
    except ValueError as error:
        return ungradable("unreadable", str(error))
    return graded(model.score(token_ids))
