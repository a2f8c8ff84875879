"""Problems for RL and for evaluation, drawn by keyed randomness from disjoint shares of the task.

A step begins here: `rl_problems(config, tokenizer, step, count)` is the same list whatever the number of ranks, for it
depends on (run.seed, step, round) alone. Which share an exercise belongs to is a hash of the exercise, so corpus, RL
and held-out problems cannot meet. Left out: datasets read from files.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Collection, Iterable
from typing import Literal

from reason_rl.config import Config, ConfigError, TaskConfig
from reason_rl.data.tasks import TASKS, Exercise, Task
from reason_rl.data.tokenizer import Tokenizer
from reason_rl.types import Problem

Split = Literal["train", "rl", "heldout"]
MAX_FRUITLESS_DRAWS = 50_000
"""Draws in a row that bring nothing new before a share counts as exhausted: about a second's work."""


def split_of(key: str, task: TaskConfig) -> Split:
    """The share an exercise's key belongs to: a fixed point of [0, 1) by hash, cut at heldout_share and rl_share."""
    point = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8, person=b"split").digest(), "big") / 2**64
    if point < task.heldout_share:
        return "heldout"
    return "rl" if point < task.heldout_share + task.rl_share else "train"


def problem_id_of(task_name: str, prompt: str) -> int:
    """Stable, in [0, 2**62)."""
    digest = hashlib.blake2b(f"{task_name}/{prompt}".encode(), digest_size=8, person=b"problem").digest()
    return int.from_bytes(digest, "big") >> 2


def task_of(config: Config) -> Task:
    """The configured task, once its levels and operations are known to make sense."""
    task = TASKS.get(config.task.name)
    if task is None:
        raise ConfigError(f"unknown task.name {config.task.name!r}; known are {', '.join(sorted(TASKS))}")
    for key, level in (("task.min_level", config.task.min_level), ("task.max_level", config.task.max_level)):
        if level not in task.levels:
            raise ConfigError(f"{key} must be between {task.levels[0]} and {task.levels[-1]} for task {task.name!r}, "
                              f"got {level}")
    unknown = set(config.task.operations) - set(task.operations)
    if task.operations and (unknown or not config.task.operations):
        raise ConfigError(f"task.operations must be some of {task.operations!r} for task {task.name!r}, "
                          f"got {config.task.operations!r}")
    return task


def rl_problems(config: Config, tokenizer: Tokenizer, step: int, count: int, round: int = 0,
                exclude: Collection[int] = ()) -> list[Problem]:
    """`count` distinct problems of the RL share for one step.

    round: 0, then 1, 2, ... for dynamic sampling's refills of the same step.
    exclude: ids of problems the step has already had; a repeated one would draw the same completions once more.
    """
    rng = random.Random(f"{config.run.seed}/rl/{step}/{round}")
    return _distinct(config, tokenizer, "rl", rng, count, exclude)


def heldout_problems(config: Config, tokenizer: Tokenizer, count: int, seed: int = 0) -> list[Problem]:
    """The first `count` distinct problems of the held-out share, in an order that only `seed` decides."""
    return _distinct(config, tokenizer, "heldout", random.Random(f"{seed}/heldout"), count, ())


def check_problems(problems: Iterable[Problem], config: Config) -> None:
    """Raises when a prompt and its longest completion would not fit the context."""
    room = config.model.max_positions - config.sampling.max_tokens
    for problem in problems:
        if len(problem.prompt_ids) > room:
            raise ValueError(f"the prompt {problem.prompt[:60]!r} has {len(problem.prompt_ids)} tokens, but "
                             f"model.max_positions = {config.model.max_positions} less sampling.max_tokens = "
                             f"{config.sampling.max_tokens} leaves {room}")


def draw_exercise(task: Task, config: TaskConfig, rng: random.Random, level: int, split: Split) -> Exercise:
    """An exercise of that level in that share, by drawing until one falls into it."""
    for _ in range(MAX_FRUITLESS_DRAWS):
        exercise = task.draw(rng, level, config.operations)
        if split_of(exercise.key, config) == split:
            return exercise
    raise ValueError(f"task {task.name!r} has no {split} problem at level {level}: give it a larger share "
                     f"(heldout_share = {config.heldout_share}, rl_share = {config.rl_share})")


def _distinct(config: Config, tokenizer: Tokenizer, split: Split, rng: random.Random, count: int,
              exclude: Collection[int]) -> list[Problem]:
    task = task_of(config)
    taken = set(exclude)
    found: list[Problem] = []
    fruitless = 0
    while len(found) < count:
        exercise = task.draw(rng, rng.randint(config.task.min_level, config.task.max_level), config.task.operations)
        problem_id = problem_id_of(task.name, exercise.prompt)
        if split_of(exercise.key, config.task) != split or problem_id in taken:
            fruitless += 1
            if fruitless == MAX_FRUITLESS_DRAWS:
                share = config.task.heldout_share if split == "heldout" else config.task.rl_share
                raise ValueError(
                    f"too few problems: {count} distinct {split} ones of task {task.name!r}, levels "
                    f"{config.task.min_level}..{config.task.max_level}, were asked for beside {len(exclude)} excluded, "
                    f"only {len(found)} found; its share is {share}: raise it, or ask for fewer")
            continue
        fruitless = 0
        taken.add(problem_id)
        found.append(_problem(task, exercise, problem_id, tokenizer))
    return found


def _problem(task: Task, exercise: Exercise, problem_id: int, tokenizer: Tokenizer) -> Problem:
    return Problem(problem_id=problem_id, task=task.name, prompt=exercise.prompt,
                   prompt_ids=tuple(tokenizer.encode(exercise.prompt)), answer=exercise.answer, facts=exercise.facts,
                   level=exercise.level)
