"""The base model: next-token prediction from random weights on the synthetic corpus, then RL starts from it.

`make_base` keeps finished base models under runs/bases/, named by everything that shapes them, and reuses one when the same
is asked for again. An interrupted pretraining goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from reason_rl.config import Config
from reason_rl.data import Tokenizer, corpus_documents
from reason_rl.model.transformer import Transformer
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
from reason_rl.trainer.distributed import World, shard
from reason_rl.trainer.metrics import read_jsonl
from reason_rl.trainer.optimizer import Optimizer, lr_factor
from reason_rl.trainer.step import supervised_update
from reason_rl.trainer.terminal import View

HISTORY_FILE = "pretrain.jsonl"
"""Beside the weights: the phase's metrics, so that a run that reuses the base can show how it came to be."""
SAVE_EVERY_S = 300.0
LOG_EVERY = 10
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


def pretrain(
    config: Config, world: World, tokenizer: Tokenizer, folder: Path, view: View, should_stop: Callable[[], bool]
) -> None:
    """Write a base model to `folder`; its unfinished checkpoints stand beside it until then."""
    partial = folder.with_name(f"{folder.name}-unfinished")
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

    def save(where: Path, step: int) -> None:
        done = Progress("pretrain", step, 0, {"pretrain_s": progress.seconds["pretrain_s"] + time.perf_counter() - start})
        save_checkpoint(where, model, world, tokenizer_json=tokenizer.to_json(), eos_id=tokenizer.eos_id,
                        optimizer=optimizer if where != folder else None, progress=done,
                        extra={HISTORY_FILE: "".join(json.dumps(line) + "\n" for line in history)})

    steps, settings = config.pretrain.steps, config.pretrain
    start = saved = logged = time.perf_counter()
    view.phase("pretrain", steps, progress.step)
    tokens = tokens_since = 0
    for step, batch in enumerate(document_batches(config, tokenizer)):
        if step >= steps:
            break
        tokens += sum(len(ids) for ids, _ in batch)
        if step < progress.step:
            continue  # the corpus is a function of its index, so going on is drawing it again
        tokens_since += sum(len(ids) for ids, _ in batch)
        factor = lr_factor(config.pretrain_optim, step, steps)
        metrics = supervised_update(
            model, optimizer, pack_documents(batch, config.pretrain_optim.microbatch_tokens), world, lr_factor=factor,
            balance_coef=settings.balance_coef,
            expert_bias_rate=settings.expert_bias_rate if config.model.expert_bias else 0.0)
        now = time.perf_counter()
        if (step + 1) % LOG_EVERY == 0 or step + 1 == steps:
            metrics |= {"lr": factor * config.pretrain_optim.lr, "tokens": tokens}
            timings = {"step_s": (now - logged) / LOG_EVERY, "train_tok_s": tokens_since / (now - logged)}
            history.append({"step": step + 1, "metrics": metrics, "timings": timings})
            view.update(step + 1, metrics, timings)
            logged, tokens_since = now, 0
            # Ranks agree on when to save and stop, for saving is a collective.
            wishes = world.gather((should_stop(), now - saved > SAVE_EVERY_S))
            if step + 1 == steps:
                break  # also when asked to stop: the base is whole, and the RL loop will ask again
            if any(stop or due for stop, due in wishes):
                save(step_folder(partial, step + 1), step + 1)
                prune_checkpoints(partial, 1, world)
                saved = now
            if any(stop for stop, _ in wishes):
                raise Interrupted(f"pretraining stopped after {step + 1} of {steps} updates")
    save(folder, steps)
    if world.is_main:
        shutil.rmtree(partial, ignore_errors=True)


def pretrain_seconds(folder: Path) -> float:
    """What the base model in `folder` cost, when it was made."""
    return float(read_state(folder)["progress"]["seconds"]["pretrain_s"])
