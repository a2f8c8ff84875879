"""Problems read from JSONL files: split, filtered and encoded once, then ordered into epochs.

    held out    the rows of a separate file, or task.heldout_share of all rows, by a hash of their text
    train       the other rows, without texts that are held out, filtered by measured pass rates
    order       run.seed shuffles each epoch; step s takes its next rl.prompts_per_step, none twice

The problems of a step depend on (run.seed, step, round) alone: the same on any number of ranks, and after a
resume. If an epoch does not divide into whole steps, the shuffle decides which problems it leaves over.
Left out: reading rows (rows.py).
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable

from reason_rl.answers.ground_truth import verifier_of
from reason_rl.config import Config, ConfigError, TaskConfig
from reason_rl.data.difficulty import band_of, is_wanted, read_pass_rates
from reason_rl.data.problems import Problems, TooFewProblems, problems_digest
from reason_rl.data.rows import RowReader, find_files
from reason_rl.data.split import split_of
from reason_rl.data.tasks.base import Exercise
from reason_rl.data.tokenizer import Tokenizer
from reason_rl.records import Problem

NUM_SHOWN = 3
"""Rows left out that `describe` prints; a run writes all of them to a file."""


class FileProblems(Problems):
    def __init__(self, config: Config, tokenizer: Tokenizer) -> None:
        task = config.task
        _check_pass_rate_keys(task)
        self._task, self._seed, self._stride = task, config.run.seed, config.rl.prompts_per_step
        self._has_unused_chat_template = tokenizer.chat is not None and task.template == "plain"

        # Read the rows and split them. A text that is held out is removed from train wherever it occurs.
        reader, (path, heldout_path) = RowReader(task, verifier_of(task.name, config.reward.verifier), tokenizer), find_files(task)
        rows = list(reader.exercises(path))
        if heldout_path is None:
            held = [row for row in rows if split_of(row[1].key, task) == "heldout"]
        else:
            held = list(reader.exercises(heldout_path))
        held_keys = {exercise.key for _, exercise in held}
        if heldout_path is not None:
            reader.left_out += [f"{where}: it is held out too" for where, exercise in rows if exercise.key in held_keys]

        # Encode them, and filter train by pass rates.
        self._heldout = [problem for _, _, problem in reader.problems(held)]
        others = list(reader.problems([row for row in rows if row[1].key not in held_keys]))
        self._train, self._bands, num_filtered = _by_pass_rate(reader, others)

        self.num_train, self.num_heldout = len(self._train), len(self._heldout)
        self.left_out, self.digest = tuple(reader.left_out), problems_digest(self.all_known())
        self._summary = (f"Task {task.name}: {self.num_train:,} problems for RL and {self.num_heldout:,} held out, from {path} "
                         f"({heldout_path or f'{task.heldout_share:g} of it'} held out)")
        if num_filtered:
            self._summary += f"; {num_filtered:,} outside of the pass rates asked for"

    def train(self, step: int, count: int, round: int = 0, exclude: Collection[int] = ()) -> list[Problem]:
        """Round 0 takes the step's problems of its epoch. Further rounds take others of similar difficulty,
        and so does round 0 in place of excluded problems."""
        stride, total = self._stride, len(self._train)
        num_steps = total // stride
        if num_steps == 0:
            raise self._too_few(stride, "train", total, "ask for fewer (rl.prompts_per_step)")

        # Shuffle the epoch, sort the whole steps of it by difficulty band, and take this step's.
        epoch, place = divmod(step, num_steps)
        order = list(range(total))
        random.Random(f"{self._seed}/rl/epoch/{epoch}").shuffle(order)
        own = sorted(order[: num_steps * stride], key=self._bands.__getitem__)[place * stride : (place + 1) * stride]
        found = self._new(own if round == 0 else [], count, exclude)

        # Fill up from all train problems, nearest band first.
        if len(found) < count:
            random.Random(f"{self._seed}/rl/{step}/{round}").shuffle(order)
            order.sort(key=lambda index: abs(self._bands[index] - self._bands[own[-1]]))
            found += self._new(order, count - len(found), {*exclude, *(problem.problem_id for problem in found)})
        if len(found) < count:
            raise self._too_few(count, "train", total, f"{len(exclude)} of them are excluded")
        return found

    def heldout(self, count: int, seed: int = 0) -> list[Problem]:
        if count > len(self._heldout):
            raise self._too_few(count, "held-out", len(self._heldout),
                                "ask for fewer (eval.problems, eval.final_problems), or raise task.heldout_share")
        problems = list(self._heldout)
        random.Random(f"{seed}/heldout").shuffle(problems)
        return problems[:count]

    def all_known(self) -> list[Problem]:
        return [*self._train, *self._heldout]

    def describe(self) -> list[str]:
        line = f"{self._summary}."
        if self.left_out:
            shown = "".join(f"\n  {row}" for row in self.left_out[:NUM_SHOWN])
            line += f" {len(self.left_out):,} rows are left out:{shown}" + ("\n  ..." if len(self.left_out) > NUM_SHOWN else "")
        if not self._has_unused_chat_template:
            return [line]
        return [line, "The checkpoint has a chat template, but task.template = 'plain' does not use it; 'chat' does."]

    def _new(self, indices: Iterable[int], count: int, exclude: Collection[int]) -> list[Problem]:
        """The first `count` train problems at these indices that are distinct and not excluded."""
        taken = set(exclude)
        found: list[Problem] = []
        for problem in (self._train[index] for index in indices):
            if len(found) < count and problem.problem_id not in taken:
                taken.add(problem.problem_id)
                found.append(problem)
        return found

    def _too_few(self, count: int, split: str, num_left: int, way_out: str) -> TooFewProblems:
        return TooFewProblems(f"too few problems: asked for {count} {split} problems of task {self._task.name!r}, but "
                              f"{self._task.path} and its filters leave {num_left}: {way_out}")


def _check_pass_rate_keys(task: TaskConfig) -> None:
    if not task.pass_rates and (task.curriculum, task.min_pass_rate, task.max_pass_rate) != ("none", 0.0, 1.0):
        raise ConfigError("task.curriculum, task.min_pass_rate and task.max_pass_rate need measured pass rates: name their file in "
                          "task.pass_rates")


def _by_pass_rate(reader: RowReader, found: list[tuple[str, Exercise, Problem]]) -> tuple[list[Problem], list[int], int]:
    """-> (problems within the limits, their bands for the curriculum, number of problems outside)."""
    task = reader.config
    if not task.pass_rates:
        return [problem for _, _, problem in found], [0] * len(found), 0
    rates, num_filtered = read_pass_rates(task.pass_rates), 0
    problems: list[Problem] = []
    bands: list[int] = []
    for where, exercise, problem in found:
        rate = rates.of(problem, exercise.prompt)
        if rate is None:
            reader.reject(f"{where}: {task.pass_rates} has no pass rate of problem {problem.problem_id}")
        elif is_wanted(rate, task):
            problems.append(problem)
            bands.append(band_of(rate) if task.curriculum == "easy_first" else 0)
        else:
            num_filtered += 1
    return problems, bands, num_filtered
