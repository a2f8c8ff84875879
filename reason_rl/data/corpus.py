"""The synthetic corpus that a base model is pretrained on.

A document is a whole text, prompt and completion, and the loss is taken on all of its tokens:

    direct   a2,b*3,c-1?<think></think><answer>5</answer>
    worked   a2,b*3,c-1?<think>a2,b*3=6,c-1=5</think><answer>5</answer>
    partial  a2,b*3,c-1?<think>a2,b*3=6</think><answer>5</answer>
    fact     7*3=1

Document i is a function of (config, i) alone: the same in any order and on any rank. Exercises come from the
corpus split, which neither RL nor evaluation uses. Left out: packing and batches (the trainer).
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from reason_rl.config import Config, ConfigError
from reason_rl.data.generated import draw_exercise
from reason_rl.data.tasks import FILE_TASKS, CorpusTask, load_task
from reason_rl.data.tokenizer import Tokenizer

Kind = Literal["direct", "worked", "partial", "fact"]


@dataclass(frozen=True, slots=True)
class Document:
    token_ids: tuple[int, ...]
    """The whole text, end token included."""
    kind: Kind
    level: int
    """The exercise's level; 0 for a fact."""


def corpus_documents(config: Config, tokenizer: Tokenizer, start: int, count: int) -> list[Document]:
    """Documents start .. start + count - 1."""
    task = _corpus_task(config)
    drawn = [_draw(task, config, i) for i in range(start, start + count)]
    encoded = tokenizer.encode_batch([text for text, _, _ in drawn])
    longest = max(map(len, encoded), default=0) + 1
    if longest > config.model.max_position_embeddings:
        raise ConfigError(f"a corpus document has {longest} tokens, but model.max_position_embeddings = "
                         f"{config.model.max_position_embeddings}: raise it, or lower task.max_level")
    return [Document((*token_ids, tokenizer.eos_id), kind, level)
            for token_ids, (_, kind, level) in zip(encoded, drawn)]


def _corpus_task(config: Config) -> CorpusTask:
    """The config's task; raises ConfigError if there is no corpus for it."""
    name, way_out = config.task.name, "set model.init_from to a checkpoint's folder"
    if name in FILE_TASKS:
        raise ConfigError(f"task {name!r} reads its problems from files, so there is no corpus to pretrain a model on: {way_out}")
    task = load_task(config.task)
    if not isinstance(task, CorpusTask):
        raise ConfigError(f"task {name!r} has no corpus to pretrain a model on, because {type(task).__name__} is a Task and not a "
                          f"CorpusTask (work, wrong_answer, fact): {way_out}")
    if config.task.template != "plain":
        raise ConfigError(f"task.template must be 'plain' for pretraining, because corpus prompts are, got "
                          f"{config.task.template!r}: {way_out}")
    if config.pretrain.min_level > config.task.max_level:
        raise ConfigError(f"pretrain.min_level = {config.pretrain.min_level} is above task.max_level = {config.task.max_level}")
    return task


def _draw(task: CorpusTask, config: Config, index: int) -> tuple[str, Kind, int]:
    """(text, kind, level) of one document."""
    # A fact has no exercise.
    rng = random.Random(f"{config.run.seed}/corpus/{index}")
    if rng.random() < config.pretrain.fact_share:
        return task.fact(rng, config.task.operations), "fact", 0

    # A direct answer has an empty thought and may be wrong.
    level = rng.randint(max(config.pretrain.min_level, task.levels[0]), config.task.max_level)
    exercise = draw_exercise(task, config.task, rng, level, "corpus")
    kind = _draw_kind(config, rng, level)
    if kind == "direct":
        is_wrong = rng.random() < config.pretrain.direct_noise
        answer = task.wrong_answer(rng, exercise) if is_wrong else exercise.answer
        return exercise.prompt + completion_of((), answer), kind, level

    # A worked thought, whole or cut short after some line.
    work = task.work(exercise)
    if kind == "partial" and len(work.lines) > 1:
        kept = work.lines[:rng.randint(1, len(work.lines) - 1)]
    else:
        kind, kept = "worked", work.lines  # one line cannot be cut short
    return exercise.prompt + completion_of(kept, work.answer, task.separator), kind, level


def completion_of(lines: tuple[str, ...], answer: str, separator: str = ",") -> str:
    """The completion with this thought and answer, without its end token."""
    return f"<think>{separator.join(lines)}</think><answer>{answer}</answer>"


def _draw_kind(config: Config, rng: random.Random, level: int) -> Kind:
    """Below task.min_level, easy_worked_share replaces worked_share, and fewer documents are direct."""
    pretrain = config.pretrain
    worked = pretrain.worked_share if level >= config.task.min_level else pretrain.easy_worked_share
    partial = 1.0 - pretrain.direct_share - pretrain.worked_share
    point = rng.random()
    if point < worked:
        return "worked"
    return "partial" if point < worked + partial else "direct"
