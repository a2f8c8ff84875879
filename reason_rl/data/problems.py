"""Problems for RL and for evaluation: made by keyed randomness in disjoint shares of a task, or taken from its files (dataset.py).

A step begins here: `rl_problems(config, tokenizer, step, count)` is the same list whatever the number of ranks, for it
depends on (run.seed, step, round) alone. Which share an exercise belongs to is a hash of the exercise, so corpus, RL
and held-out problems cannot meet.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Collection, Iterable, Sequence

from reason_rl.config import Config, ConfigError, TaskConfig
from reason_rl.data.dataset import first_heldout, load_dataset, step_problems
from reason_rl.data.prompts import PromptTemplate, load_template
from reason_rl.data.split import Split, problem_id_of, split_of
from reason_rl.data.tasks import FILE_TASKS, TASKS, Exercise, Task
from reason_rl.data.tokenizer import Tokenizer
from reason_rl.records import Problem

MAX_FRUITLESS_DRAWS = 50_000
"""Draws in a row that bring nothing new before a share counts as exhausted: about a second's work."""


class TooFewProblems(ValueError):
    """A task has fewer distinct problems left than were asked for."""


class Problems:
    """A task's problems: train and heldout share none."""

    def __init__(self, config: Config, tokenizer: Tokenizer) -> None:
        self._config, self._tokenizer = config, tokenizer
        self._dataset = load_dataset(config, tokenizer) if is_file_task(config) else None
        self.num_train = None if self._dataset is None else len(self._dataset.rl)
        self.num_heldout = None if self._dataset is None else len(self._dataset.heldout)

    def train(self, step: int, count: int, round: int = 0, exclude: Collection[int] = ()) -> list[Problem]:
        return rl_problems(self._config, self._tokenizer, step, count, round, exclude)

    def heldout(self, count: int, seed: int = 0) -> list[Problem]:
        return heldout_problems(self._config, self._tokenizer, count, seed)

    def all_known(self) -> list[Problem]:
        return [] if self._dataset is None else [*self._dataset.rl, *self._dataset.heldout]

    def describe(self) -> list[str]:
        return describe_problems(self._config, self._tokenizer)[0]

    def check(self, problems: Iterable[Problem], config: Config) -> None:
        check_problems(problems, config)


def load_problems(config: Config, tokenizer: Tokenizer) -> Problems:
    return Problems(config, tokenizer)


def is_file_task(config: Config) -> bool:
    if config.task.name not in (*TASKS, *FILE_TASKS):
        raise ConfigError(f"unknown task.name {config.task.name!r}; known are {', '.join((*TASKS, *FILE_TASKS))}")
    return config.task.name in FILE_TASKS


def task_of(config: Config) -> Task:
    """The configured task that makes its own problems, once its levels and operations are known to make sense."""
    if is_file_task(config):
        raise ConfigError(f"task {config.task.name!r} reads its problems from files, so there is no corpus to pretrain a model on: "
                          "give model.init_from a checkpoint's folder")
    task = TASKS[config.task.name]
    for key in ("path", "heldout_path", "max_prompt_tokens", "pass_rates", "min_pass_rate", "max_pass_rate", "curriculum"):
        if getattr(config.task, key) != getattr(TaskConfig(), key):
            raise ConfigError(f"task {task.name!r} makes its own problems; task.{key} is for {', '.join(FILE_TASKS)}")
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
    if is_file_task(config):
        return step_problems(load_dataset(config, tokenizer), config, step, count, round, exclude)
    rng = random.Random(f"{config.run.seed}/rl/{step}/{round}")
    return _distinct(config, tokenizer, "rl", rng, count, exclude)


def heldout_problems(config: Config, tokenizer: Tokenizer, count: int, seed: int = 0) -> list[Problem]:
    """The first `count` distinct problems of the held-out share, in an order that only `seed` decides."""
    if is_file_task(config):
        return first_heldout(load_dataset(config, tokenizer), config, count, seed)
    return _distinct(config, tokenizer, "heldout", random.Random(f"{seed}/heldout"), count, ())


def problems_to_check(config: Config, tokenizer: Tokenizer, num_heldout: int) -> list[Problem]:
    """What must be looked at before any work: all problems of a file; of those that are made, the first step's and evaluation's."""
    if not config.model.init_from:
        task_of(config)
        if config.task.template != "plain":
            raise ConfigError(f"task.template = {config.task.template!r} needs a checkpoint's model (model.init_from): the corpus "
                              "that our own is pretrained on has plain prompts")
    problems = rl_problems(config, tokenizer, 0, config.rl.prompts_per_step) + heldout_problems(config, tokenizer, num_heldout)
    if not is_file_task(config):
        return problems
    dataset = load_dataset(config, tokenizer)
    return [*dataset.rl, *dataset.heldout]


def describe_problems(config: Config, tokenizer: Tokenizer) -> tuple[list[str], tuple[str, ...]]:
    """(lines that a run should say of its task, every row of its files that was left out and why)."""
    if not is_file_task(config):
        return [], ()
    dataset = load_dataset(config, tokenizer)
    left_out = dataset.left_out
    lines = [dataset.description + (f". {len(left_out):,} rows are left out:{_first(left_out)}" if left_out else ".")]
    if tokenizer.chat is not None and config.task.template == "plain":
        lines.append("The checkpoint has a chat template, which task.template = 'plain' leaves unused; 'chat' goes through it.")
    return lines, left_out


def _first(rows: Sequence[str]) -> str:
    return "".join(f"\n  {row}" for row in rows[:3]) + ("\n  ..." if len(rows) > 3 else "")


def problems_digest(problems: Iterable[Problem]) -> str:
    """Tells when a file or a template has changed under a run or an evaluation."""
    told = "/".join(f"{problem.problem_id}:{problem.prompt_ids}:{problem.answer}:{dict(problem.facts)}" for problem in problems)
    return hashlib.blake2b(told.encode(errors="replace"), digest_size=8).hexdigest()


def check_problems(problems: Iterable[Problem], config: Config) -> None:
    """Raises when a prompt and its longest completion would not fit the context."""
    room = config.model.max_position_embeddings - config.sampling.max_tokens
    for problem in problems:
        if len(problem.prompt_ids) > room:
            raise ValueError(f"the prompt {problem.prompt[:60]!r} has {len(problem.prompt_ids)} tokens, but "
                             f"model.max_position_embeddings = {config.model.max_position_embeddings} less sampling.max_tokens = "
                             f"{config.sampling.max_tokens} leaves {room}"
                             + ("; task.max_prompt_tokens leaves longer ones out" if is_file_task(config) else ""))


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
    task, template = task_of(config), load_template(config.task.template)
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
                raise TooFewProblems(
                    f"too few problems: {count} distinct {split} ones of task {task.name!r}, levels "
                    f"{config.task.min_level}..{config.task.max_level}, were asked for beside {len(exclude)} excluded, "
                    f"only {len(found)} found; its share is {share}: raise it, or ask for fewer")
            continue
        fruitless = 0
        taken.add(problem_id)
        found.append(_problem(task, exercise, problem_id, template, tokenizer))
    return found


def _problem(task: Task, exercise: Exercise, problem_id: int, template: PromptTemplate, tokenizer: Tokenizer) -> Problem:
    text = template.fill(exercise.prompt, tokenizer)
    return Problem(problem_id=problem_id, task=task.name, prompt=text, prompt_ids=tuple(template.encode([text], tokenizer)[0]),
                   answer=exercise.answer, facts=exercise.facts, level=exercise.level, completion_prefix=template.prefix_of(text))
