"""Problems drawn from a generated task by keyed randomness.

The split of an exercise is a hash of its key, and a problem is drawn until it falls into the split that is
asked for. So the corpus, training and held-out problems are disjoint whatever their seeds.
"""

from __future__ import annotations

import random
from collections.abc import Collection

from reason_rl.config import Config, TaskConfig
from reason_rl.data.problems import Problems, TooFewProblems
from reason_rl.data.prompts import load_template
from reason_rl.data.split import Split, problem_id_of, share_of, split_of
from reason_rl.data.tasks import Exercise, Task, load_task
from reason_rl.data.tokenizer import Tokenizer
from reason_rl.records import Problem

MAX_FRUITLESS_DRAWS = 50_000
"""Draws in succession that give no new problem before a split counts as exhausted: about a second's work."""


class GeneratedProblems(Problems):
    def __init__(self, config: Config, tokenizer: Tokenizer) -> None:
        self._config, self._seed, self._tokenizer = config.task, config.run.seed, tokenizer
        self._task, self._template = load_task(config.task), load_template(config.task.template)

    def train(self, step: int, count: int, round: int = 0, exclude: Collection[int] = ()) -> list[Problem]:
        return self._distinct("train", random.Random(f"{self._seed}/rl/{step}/{round}"), count, exclude)

    def heldout(self, count: int, seed: int = 0) -> list[Problem]:
        return self._distinct("heldout", random.Random(f"{seed}/heldout"), count, ())

    def _distinct(self, split: Split, rng: random.Random, count: int, exclude: Collection[int]) -> list[Problem]:
        """`count` problems of the split, none of them twice and none in `exclude`."""
        config, taken = self._config, set(exclude)
        found: list[Problem] = []
        num_fruitless = 0
        while len(found) < count:
            # Draw an exercise; drop it if it is in another split or already taken.
            exercise = self._task.draw(rng, rng.randint(config.min_level, config.max_level), config.operations)
            problem_id = problem_id_of(config.name, exercise.prompt)
            if split_of(exercise.key, config) == split and problem_id not in taken:
                num_fruitless = 0
                taken.add(problem_id)
                found.append(self._problem(exercise, problem_id))
                continue
            # Give up when the split has nothing new to give.
            num_fruitless += 1
            if num_fruitless == MAX_FRUITLESS_DRAWS:
                key, share = share_of(split, config)
                raise TooFewProblems(
                    f"too few problems: asked for {count} distinct {split} problems of task {config.name!r}, levels "
                    f"{config.min_level}..{config.max_level}, besides {len(exclude)} excluded ones, got {len(found)}; {key} is "
                    f"{share}: raise it, or ask for fewer")
        return found

    def _problem(self, exercise: Exercise, problem_id: int) -> Problem:
        text = self._template.fill(exercise.prompt, self._tokenizer)
        (prompt_ids,) = self._template.encode([text], self._tokenizer)
        return Problem(problem_id, self._config.name, text, tuple(prompt_ids), exercise.answer, exercise.facts, exercise.level,
                       self._template.prefix_of(text))


def draw_exercise(task: Task, config: TaskConfig, rng: random.Random, level: int, split: Split) -> Exercise:
    """An exercise of that level in that split, drawn until one falls into it."""
    for _ in range(MAX_FRUITLESS_DRAWS):
        exercise = task.draw(rng, level, config.operations)
        if split_of(exercise.key, config) == split:
            return exercise
    raise TooFewProblems(f"task {config.name!r} has no {split} problem at level {level}: give that split a larger share "
                         f"(task.heldout_share = {config.heldout_share}, task.rl_share = {config.rl_share})")
