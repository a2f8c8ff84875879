"""Pretraining: a base model from random weights, by next-token prediction on the synthetic corpus.

Left out: an evaluation (grpo evaluates before its first step), and a validation loss (every step draws new
documents).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import ClassVar

from reason_rl.config import Config
from reason_rl.data import Problems, Tokenizer, corpus_documents
from reason_rl.model.transformer import Transformer
from reason_rl.records import StepStats
from reason_rl.rl.packing import pack_documents
from reason_rl.stages.base import Metrics, StageStart
from reason_rl.trainer.update import supervised_update

DOCUMENTS_PER_DRAW = 512

Document = tuple[tuple[int, ...], int]
"""Token ids, and the number of leading ones without loss (a prompt): 0 in a corpus."""


class Pretrain:
    kind: ClassVar[str] = "pretrain"
    sections: ClassVar[tuple[str, ...]] = ("model", "task", "pretrain", "pretrain_optim")
    # Without the kernels: an edit there changes the weights by a rounding, and the base model takes most of a run's time.
    code: ClassVar[tuple[str, ...]] = (
        "model", "data", "rl/packing.py", "trainer/update.py", "trainer/optimizer.py", "trainer/policy.py", "stages/pretrain.py")
    starts_from_weights: ClassVar[bool] = False
    uses_problems: ClassVar[bool] = False
    log_every: ClassVar[int] = 10

    def __init__(self, start: StageStart) -> None:
        # The model.
        config = start.config
        self.config, self.world = config, start.world
        self.num_steps, self.checkpoint_every = self.num_steps_of(config), 0
        model = Transformer(config.model, start.tokenizer.vocab_size, start.world.dtype).initialise(config.run.seed)
        self.policy = start.policy(model, config.pretrain_optim, self.num_steps)

        # The corpus always has the same order, so a resumed stage draws the documents that it has trained on
        # and skips them.
        self._batches = document_batches(config, start.tokenizer)
        self._num_tokens = sum(num_tokens_of(next(self._batches)) for _ in range(self.policy.num_steps_done))
        self._since_log_s, self._since_log_tokens = 0.0, 0

    @staticmethod
    def num_steps_of(config: Config) -> int:
        return config.pretrain.steps

    @staticmethod
    def check(config: Config, tokenizer: Tokenizer, problems: Problems | None) -> list[str]:
        corpus_documents(config, tokenizer, 0, DOCUMENTS_PER_DRAW)  # raises if a document does not fit the context
        return []

    def step(self, index: int) -> StepStats:
        """One update on packed whole documents: cross-entropy on every token but a document's first."""
        # The update.
        started_s = time.perf_counter()
        settings, optim = self.config.pretrain, self.config.pretrain_optim
        batch = next(self._batches)
        factor = self.policy.lr_factor(index)
        metrics = supervised_update(
            self.policy, pack_documents(batch, optim.microbatch_tokens), lr_factor=factor,
            balance_coef=settings.balance_coef, z_loss_coef=settings.z_loss_coef,
            expert_bias_rate=settings.expert_bias_rate if self.config.model.expert_bias else 0.0)

        # Metrics and timings.
        self._num_tokens += num_tokens_of(batch)
        timings = self._timings(index, time.perf_counter() - started_s, num_tokens_of(batch))
        return StepStats(index, metrics | {"lr": factor * optim.lr, "tokens": self._num_tokens}, timings)

    def evaluate(self, num_done: int) -> Metrics | None:
        return None

    def close(self) -> None:
        pass

    def _timings(self, index: int, step_s: float, num_tokens: int) -> dict[str, float]:
        """Means over the steps since the last line of the log."""
        self._since_log_s += step_s
        self._since_log_tokens += num_tokens
        timings = {"step_s": self._since_log_s / (index % self.log_every + 1),
                   "train_tok_s": self._since_log_tokens / self._since_log_s}
        if (index + 1) % self.log_every == 0:
            self._since_log_s, self._since_log_tokens = 0.0, 0
        return timings


def num_tokens_of(batch: list[Document]) -> int:
    return sum(len(token_ids) for token_ids, _ in batch)


def document_batches(config: Config, tokenizer: Tokenizer) -> Iterator[list[Document]]:
    """Endless batches of whole documents in corpus order, each of at most pretrain.tokens_per_step tokens."""
    batch: list[Document] = []
    used = start = 0
    while True:
        for document in corpus_documents(config, tokenizer, start, DOCUMENTS_PER_DRAW):
            if batch and used + len(document.token_ids) > config.pretrain.tokens_per_step:
                yield batch
                batch, used = [], 0
            batch.append((document.token_ids, 0))
            used += len(document.token_ids)
        start += DOCUMENTS_PER_DRAW
