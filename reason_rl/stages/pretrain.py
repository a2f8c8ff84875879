"""The base model: next-token prediction from random weights on the synthetic corpus, then RL starts from it.

`make_base` keeps finished base models under runs/bases/, named by everything that shapes them, and reuses one when the same
is asked for again. An interrupted pretraining goes on where it stopped. Left out: what follows from the base (run.py).
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from reason_rl.config import Config
from reason_rl.data import Tokenizer, corpus_documents
from reason_rl.model.transformer import Transformer
from reason_rl.parallel.fsdp import shard
from reason_rl.parallel.world import World
from reason_rl.report.log import read_jsonl
from reason_rl.report.terminal import View
from reason_rl.rl.packing import pack_documents
from reason_rl.trainer.checkpoint import (
    Progress,
    load_checkpoint,
    newest_checkpoint,
    prune_checkpoints,
    read_state,
    save_checkpoint,
    step_folder,
)
from reason_rl.trainer.optimizer import Optimizer, lr_factor
from reason_rl.trainer.update import supervised_update

HISTORY_FILE = "pretrain.jsonl"
"""Beside the weights: the phase's metrics, so that a run that reuses the base can show how it came to be."""
SAVE_EVERY_S = 300.0
LOG_EVERY = 10
LOCK_POLL_S = 1.0
DOCUMENTS_PER_DRAW = 512


class Interrupted(Exception):
    """Asked to stop (Ctrl-C): what was done is saved."""


def base_folder(config: Config, dtype: str) -> Path:
    """runs/bases/<task>-<digest of model, task, corpus, optimizer, seed and dtype>."""
    shape = {name: dataclasses.asdict(getattr(config, name)) for name in ("model", "task", "pretrain", "pretrain_optim")}
    text = json.dumps([shape, config.run.seed, dtype], sort_keys=True)
    return Path(config.run.out_dir) / "bases" / f"{config.task.name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def document_batches(config: Config, tokenizer: Tokenizer) -> Iterator[list[tuple[tuple[int, ...], int]]]:
    """Batches of whole documents, of at most pretrain.tokens_per_step tokens each, in the corpus's order, without end."""
    batch: list[tuple[tuple[int, ...], int]] = []
    used = start = 0
    while True:
        for document in corpus_documents(config, tokenizer, start, DOCUMENTS_PER_DRAW):
            if batch and used + len(document.token_ids) > config.pretrain.tokens_per_step:
                yield batch
                batch, used = [], 0
            batch.append((document.token_ids, 0))
            used += len(document.token_ids)
        start += DOCUMENTS_PER_DRAW


def make_base(config: Config, world: World, tokenizer: Tokenizer, view: View, should_stop: Callable[[], bool]) -> Path:
    """The folder of the base model, pretrained now or reused. Of two runs that want the same one, the second waits."""
    folder = base_folder(config, str(world.dtype))
    if not world.gather(folder.is_dir())[0]:
        with _only_one_run(folder.with_name(f"{folder.name}.lock"), world, view, should_stop):
            if not world.gather(folder.is_dir())[0]:
                pretrain(config, world, tokenizer, folder, view, should_stop)
                return folder
    view.message(f"Base model reused: {folder}")
    return folder


@contextmanager
def _only_one_run(lock: Path, world: World, view: View, should_stop: Callable[[], bool]) -> Iterator[None]:
    """Rank 0 holds a lock on the file, which the system lets go of however the process ends; the other ranks wait for rank 0."""
    file = _try_lock(lock) if world.is_main else None
    is_ours = world.gather(file is not None)[0]
    if not is_ours:
        view.message(f"Another run is making this base model ({lock}): waiting for it.")
    while not is_ours:
        if any(world.gather(should_stop())):
            raise Interrupted("stopped while waiting for another run's base model")
        time.sleep(LOCK_POLL_S)
        file = _try_lock(lock) if world.is_main else None
        is_ours = world.gather(file is not None)[0]
    try:
        yield
    finally:
        if file is not None:
            lock.unlink(missing_ok=True)
            file.close()


def _try_lock(path: Path) -> TextIO | None:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a")
    with suppress(BlockingIOError, FileNotFoundError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(file.fileno()).st_ino == path.stat().st_ino:
            return file  # else its holder has just taken it away: a lock on a file that no one else will find
    file.close()
    return None


@dataclass
class _Record:
    """The phase's log and its clock. Rates leave out saving, and drawing what an earlier session has trained on."""

    view: View
    history: list[dict[str, Any]]
    before_s: float
    """Wall-clock of earlier sessions."""
    started_s: float = field(default_factory=time.perf_counter)
    since_s: float = 0.0
    steps: int = 0
    tokens: int = 0

    def restart_clock(self) -> None:
        self.since_s, self.steps, self.tokens = time.perf_counter(), 0, 0

    def count(self, num_tokens: int) -> None:
        self.steps, self.tokens = self.steps + 1, self.tokens + num_tokens

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Metrics of the update just made, and the rates since the clock was last restarted."""
        passed = time.perf_counter() - self.since_s
        timings = {"step_s": passed / self.steps, "train_tok_s": self.tokens / passed}
        self.history.append({"step": step, "metrics": metrics, "timings": timings})
        self.view.update(step, metrics, timings)
        self.restart_clock()

    def save(self, folder: Path, step: int, model: Transformer, world: World, tokenizer: Tokenizer,
             optimizer: Optimizer | None) -> None:
        """A collective. A finished base that another run has put there meanwhile stays as it is."""
        seconds = {"pretrain_s": self.before_s + time.perf_counter() - self.started_s}
        save_checkpoint(folder, model, world, tokenizer_json=tokenizer.to_json(), eos_id=tokenizer.eos_id, optimizer=optimizer,
                        progress=Progress("pretrain", step, 0, seconds), replace=optimizer is not None,
                        extra={HISTORY_FILE: "".join(json.dumps(line) + "\n" for line in self.history)})


def _begin(config: Config, world: World, tokenizer: Tokenizer, partial: Path, view: View) -> tuple[
        Transformer, Optimizer, _Record, int]:
    """Fresh, or where an earlier session stopped -> (model, optimizer, record, updates done)."""
    model = Transformer(config.model, tokenizer.vocab_size, world.dtype).initialise(config.run.seed)
    newest = newest_checkpoint(partial)
    progress, optimizer_state = Progress("pretrain", 0, 0, {"pretrain_s": 0.0}), None
    if newest is not None:
        progress, optimizer_state = load_checkpoint(newest, model)
    model.to(world.device)
    shard(model, world)
    optimizer = Optimizer(model, config.pretrain_optim)
    if optimizer_state is not None:
        optimizer.load_state_dict(optimizer_state)
    history = read_jsonl(newest / HISTORY_FILE) if newest else []
    return model, optimizer, _Record(view, history, progress.seconds["pretrain_s"]), progress.step


def pretrain(
    config: Config, world: World, tokenizer: Tokenizer, folder: Path, view: View, should_stop: Callable[[], bool]
) -> None:
    """Write a base model to `folder`; its unfinished checkpoints stand beside it until then."""
    partial = folder.with_name(f"{folder.name}-unfinished")
    model, optimizer, record, first = _begin(config, world, tokenizer, partial, view)
    steps, settings, tokens = config.pretrain.steps, config.pretrain, 0
    view.phase("pretrain", steps, first)
    saved_s = time.perf_counter()
    for step, batch in enumerate(islice(document_batches(config, tokenizer), steps)):
        num_tokens = sum(len(ids) for ids, _ in batch)
        tokens += num_tokens
        if step < first:
            continue  # the corpus is a function of its index, so going on is drawing it again
        if step == first:
            record.restart_clock()
        factor, done = lr_factor(config.pretrain_optim, step, steps), step + 1
        metrics = supervised_update(
            model, optimizer, pack_documents(batch, config.pretrain_optim.microbatch_tokens), world, lr_factor=factor,
            balance_coef=settings.balance_coef, z_loss_coef=settings.z_loss_coef,
            expert_bias_rate=settings.expert_bias_rate if config.model.expert_bias else 0.0)
        record.count(num_tokens)
        if done % LOG_EVERY and done < steps:
            continue
        record.log(done, metrics | {"lr": factor * config.pretrain_optim.lr, "tokens": tokens})
        # Ranks agree on when to save and stop, for saving is a collective.
        wishes = world.gather((should_stop(), time.perf_counter() - saved_s > SAVE_EVERY_S))
        if done == steps:
            break  # also when asked to stop: the base is whole, and the RL loop will ask again
        if any(stop or due for stop, due in wishes):
            record.save(step_folder(partial, done), done, model, world, tokenizer, optimizer)
            prune_checkpoints(partial, 1, world)
            saved_s = time.perf_counter()
            record.restart_clock()
        if any(stop for stop, _ in wishes):
            raise Interrupted(f"pretraining stopped after {done} of {steps} updates")
    record.save(folder, steps, model, world, tokenizer, None)
    if world.is_main:
        shutil.rmtree(partial, ignore_errors=True)


def pretrain_seconds(folder: Path) -> float:
    """What the base model in `folder` cost, when it was made."""
    return float(read_state(folder)["progress"]["seconds"]["pretrain_s"])
