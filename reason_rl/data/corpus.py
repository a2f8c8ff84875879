"""The synthetic corpus that the base model is pretrained on.

Documents are whole texts, prompt and answer, and the loss is taken on all of their tokens:

    direct   a2,b*3,c-1?<think></think><answer>5</answer>
    worked   a2,b*3,c-1?<think>a2,b*3=6,c-1=5</think><answer>5</answer>
    partial  a2,b*3,c-1?<think>a2,b*3=6</think><answer>5</answer>
    fact     7*3=1

Document i is a function of (config, i) alone: the same in any order and on any rank. Problems come from the share that
neither RL nor evaluation sees. Left out: packing and batches, which are the trainer's.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from reason_rl.config import Config, ConfigError
from reason_rl.data.problems import draw_exercise, task_of
from reason_rl.data.tasks import Task
from reason_rl.data.tokenizer import Tokenizer

Kind = Literal["direct", "worked", "partial", "fact"]


@dataclass(frozen=True, slots=True)
class Document:
    token_ids: tuple[int, ...]
    """The whole text, end token included."""
    kind: Kind
    level: int
    """The problem's level; 0 for a fact."""


def corpus_documents(config: Config, tokenizer: Tokenizer, start: int, count: int) -> list[Document]:
    """Documents start .. start + count - 1."""
    task = task_of(config)
    if config.pretrain.min_level > config.task.max_level:
        raise ConfigError(f"pretrain.min_level = {config.pretrain.min_level} is above task.max_level = "
                          f"{config.task.max_level}")
    drawn = [_draw(task, config, i) for i in range(start, start + count)]
    encoded = tokenizer.encode_batch([text for text, _, _ in drawn])
    longest = max(map(len, encoded), default=0) + 1
    if longest > config.model.max_position_embeddings:
        raise ValueError(f"a corpus document has {longest} tokens, but model.max_position_embeddings = "
                         f"{config.model.max_position_embeddings}: raise it, or lower task.max_level")
    return [Document((*token_ids, tokenizer.eos_id), kind, level)
            for token_ids, (_, kind, level) in zip(encoded, drawn)]


def _draw(task: Task, config: Config, index: int) -> tuple[str, Kind, int]:
    """(text, kind, level) of one document."""
    rng = random.Random(f"{config.run.seed}/corpus/{index}")
    if rng.random() < config.pretrain.fact_share:
        return task.fact(rng, config.task.operations), "fact", 0
    level = rng.randint(max(config.pretrain.min_level, task.levels[0]), config.task.max_level)
    exercise = draw_exercise(task, config.task, rng, level, "train")
    kind = _draw_kind(config, rng, level)
    if kind == "direct":
        is_wrong = rng.random() < config.pretrain.direct_noise
        answer = task.wrong_answer(rng, exercise) if is_wrong else exercise.answer
        return exercise.prompt + completed((), answer), kind, level
    work = task.work(exercise)
    if kind == "partial" and len(work.lines) > 1:
        kept = work.lines[:rng.randint(1, len(work.lines) - 1)]
    else:
        kind, kept = "worked", work.lines  # one line cannot be cut short
    return exercise.prompt + completed(kept, work.answer, task.separator), kind, level


def completed(lines: tuple[str, ...], answer: str, separator: str = ",") -> str:
    """The completion that thinks these lines and gives this answer: R1-Zero's template, end token aside."""
    return f"<think>{separator.join(lines)}</think><answer>{answer}</answer>"


def _draw_kind(config: Config, rng: random.Random, level: int) -> Kind:
    """Problems easier than RL's are worked at easy_worked_share, at the expense of the direct ones."""
    pretrain = config.pretrain
    worked = pretrain.worked_share if level >= config.task.min_level else pretrain.easy_worked_share
    partial = 1.0 - pretrain.direct_share - pretrain.worked_share
    point = rng.random()
    if point < worked:
        return "worked"
    return "partial" if point < worked + partial else "direct"
