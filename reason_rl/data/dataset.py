"""The problems of a task that stands in files: read, checked, split and encoded once, and which of them a step takes.

    every row         JSON, the task's fields, an answer that its verifier can read; else an error with file and line, or left out
    held out          a file of their own, else task.heldout_share of the rows by a hash of their text; never a text that RL has too
    RL                the others, filtered by measured pass rates
    order             a shuffle by run.seed for each epoch; step s takes the next rl.prompts_per_step, each problem once an epoch

What a step takes follows from (run.seed, step, round) alone: the same on any number of ranks, and after a resume. What is left over
where an epoch cannot be divided evenly changes with the shuffle. Left out: files that do not fit in memory.
"""

from __future__ import annotations

import json
import random
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from reason_rl.answers.ground_truth import verifier_of, why_unreadable
from reason_rl.config import Config, ConfigError, TaskConfig
from reason_rl.data.difficulty import band_of, is_wanted, read_pass_rates
from reason_rl.data.prompts import load_template
from reason_rl.data.split import problem_id_of, split_of
from reason_rl.data.tasks.base import Exercise
from reason_rl.data.tasks.files import FILE_TASKS, RowError
from reason_rl.data.tokenizer import Tokenizer
from reason_rl.records import Problem


@dataclass(frozen=True)
class Dataset:
    rl: tuple[Problem, ...]
    heldout: tuple[Problem, ...]
    bands: tuple[int, ...]
    """Of each RL problem, for the curriculum: 0 is taken first."""
    left_out: tuple[str, ...]
    """The rows that are no part of it, by file and line, and why."""
    description: str


@dataclass
class _Reader:
    """What is common to the files of one task."""

    config: TaskConfig
    verifier: str
    tokenizer: Tokenizer
    left_out: list[str] = field(default_factory=list)

    def exercises(self, path: Path) -> Iterator[tuple[str, Exercise]]:
        """(file:line, exercise) of each row that is a problem, and no other row's again."""
        seen: dict[str, tuple[str, Exercise]] = {}
        for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                exercise = self._exercise(line)
                if exercise is None:
                    continue
                first, same = seen.setdefault(" ".join(exercise.prompt.split()), (where, exercise))
                if same.answer != exercise.answer and self.verifier != "code":  # programs differ and are right
                    raise RowError(f"it asks the same as {first}, with another answer")
            except RowError as error:
                self.bad_row(f"{where}: {error}")
                continue
            if first == where:
                yield where, exercise
            else:
                self.left_out.append(f"{where}: the same problem as {first}")

    def _exercise(self, line: bytes) -> Exercise | None:
        try:
            row = json.loads(line.decode())
        except (ValueError, RecursionError) as error:
            raise RowError(f"it is not valid JSON: {error}") from error
        if not isinstance(row, dict):
            raise RowError(f"it must be a JSON object, got {type(row).__name__}")
        exercise = FILE_TASKS[self.config.name].exercise(row, self.config)
        if exercise and (reason := why_unreadable(self.verifier, exercise.answer, exercise.facts)):
            raise RowError(reason)
        return exercise

    def bad_row(self, reason: str) -> None:
        if self.config.on_bad_row == "raise":
            raise ConfigError(f"{reason}. (task.on_bad_row = 'skip' leaves such rows out and lists them.)")
        self.left_out.append(reason)

    def problems(self, rows: list[tuple[str, Exercise]]) -> Iterator[tuple[str, Exercise, Problem]]:
        """With their prompts, those longer than task.max_prompt_tokens aside."""
        template, longest = load_template(self.config.template), self.config.max_prompt_tokens
        texts = [template.fill(exercise.prompt, self.tokenizer) for _, exercise in rows]
        encoded = template.encode(texts, self.tokenizer)
        for (where, exercise), text, prompt_ids in zip(rows, texts, encoded, strict=True):
            if longest and len(prompt_ids) > longest:
                self.left_out.append(f"{where}: its prompt has {len(prompt_ids)} tokens, task.max_prompt_tokens is {longest}")
                continue
            yield where, exercise, Problem(
                problem_id_of(self.config.name, exercise.prompt), self.config.name, text, tuple(prompt_ids), exercise.answer,
                exercise.facts, exercise.level, template.prefix_of(text))


def load_dataset(config: Config, tokenizer: Tokenizer) -> Dataset:
    """The dataset of `config.task`, read once a process: a file that changes under a run does not change the run."""
    return _load(config.task, verifier_of(config.task.name, config.reward.verifier), tokenizer)


def _paths(task: TaskConfig) -> tuple[Path, Path | None]:
    """(the task's file, the held-out problems' where they have one)."""
    known, path = FILE_TASKS[task.name], Path(task.path)
    if not task.path:
        raise ConfigError(f"task {task.name!r} reads its problems from files: give task.path a JSONL file, or a folder with "
                          f"{' or '.join(known.train_names)} (and {known.heldout_name}, the held-out ones, where there is one)")
    heldout = Path(task.heldout_path) if task.heldout_path else None
    if path.is_dir():
        found = [path / name for name in known.train_names if (path / name).is_file()]
        if not found:
            raise ConfigError(f"no {' or '.join(known.train_names)} in task.path = {task.path!r}; there are "
                              f"{', '.join(sorted(one.name for one in path.iterdir())) or 'no files'}")
        if heldout is None and (path / known.heldout_name).is_file():
            heldout = path / known.heldout_name
        path = found[0]
    for key, one in (("task.path", path), ("task.heldout_path", heldout)):
        if one is not None and not one.is_file():
            raise ConfigError(f"{key} names no file: {str(one)!r}")
    if heldout is not None and heldout.samefile(path):
        raise ConfigError(f"task.path and task.heldout_path are one file, {str(path)!r}: without the second, a share is held out")
    return path, heldout


@lru_cache(maxsize=4)
def _load(task: TaskConfig, verifier: str, tokenizer: Tokenizer) -> Dataset:
    if not task.pass_rates and (task.curriculum, task.min_pass_rate, task.max_pass_rate) != ("none", 0.0, 1.0):
        raise ConfigError("task.curriculum, task.min_pass_rate and task.max_pass_rate go by measured pass rates: name their file "
                          "in task.pass_rates")
    reader, (path, heldout_path) = _Reader(task, verifier, tokenizer), _paths(task)
    rows = list(reader.exercises(path))
    if heldout_path is None:
        held = [row for row in rows if split_of(row[1].key, task) == "heldout"]
    else:
        held = list(reader.exercises(heldout_path))
    keys = {exercise.key for _, exercise in held}
    mine = [row for row in rows if row[1].key not in keys]
    if heldout_path is not None:
        reader.left_out += [f"{where}: it is held out too" for where, exercise in rows if exercise.key in keys]
    heldout = tuple(problem for _, _, problem in reader.problems(held))
    rl, bands, num_filtered = _by_pass_rate(reader, list(reader.problems(mine)))
    source = f"{path} ({heldout_path or f'{task.heldout_share:g} of it'} held out)"
    description = f"Task {task.name}: {len(rl):,} problems for RL and {len(heldout):,} held out, from {source}"
    if num_filtered:
        description += f"; {num_filtered:,} outside of the pass rates asked for"
    return Dataset(rl, heldout, bands, tuple(reader.left_out), description)


def _by_pass_rate(reader: _Reader, found: list[tuple[str, Exercise, Problem]]) -> tuple[tuple[Problem, ...], tuple[int, ...], int]:
    """(the problems that RL takes, their bands, how many the limits keep out)."""
    task = reader.config
    if not task.pass_rates:
        return tuple(problem for _, _, problem in found), (0,) * len(found), 0
    rates, kept, num_filtered = read_pass_rates(task.pass_rates), [], 0
    for where, exercise, problem in found:
        rate = rates.of(problem, exercise.prompt)
        if rate is None:
            reader.bad_row(f"{where}: {task.pass_rates} has no pass rate of problem {problem.problem_id}")
        elif is_wanted(rate, task):
            kept.append((problem, band_of(rate) if task.curriculum == "easy_first" else 0))
        else:
            num_filtered += 1
    return tuple(problem for problem, _ in kept), tuple(band for _, band in kept), num_filtered


def step_problems(dataset: Dataset, config: Config, step: int, count: int, round: int, exclude: Collection[int]) -> list[Problem]:
    """The step's own rows of its epoch; further rounds, and rows that are excluded, go on with others, near in difficulty."""
    stride, total = config.rl.prompts_per_step, len(dataset.rl)
    num_steps = total // stride
    if num_steps == 0:
        raise _too_few(stride, "RL", total, config, "ask for fewer (rl.prompts_per_step)")
    epoch, place = divmod(step, num_steps)
    order = list(range(total))
    random.Random(f"{config.run.seed}/rl/epoch/{epoch}").shuffle(order)
    own = sorted(order[: num_steps * stride], key=dataset.bands.__getitem__)[place * stride : (place + 1) * stride]
    taken: set[int] = set(exclude)
    found: list[Problem] = []

    def take(rows: list[int]) -> None:
        for problem in (dataset.rl[row] for row in rows):
            if len(found) < count and problem.problem_id not in taken:
                taken.add(problem.problem_id)
                found.append(problem)

    take(own if round == 0 else [])
    if len(found) < count:
        random.Random(f"{config.run.seed}/rl/{step}/{round}").shuffle(order)
        take(sorted(order, key=lambda row: abs(dataset.bands[row] - dataset.bands[own[-1]])))
    if len(found) < count:
        raise _too_few(count, "RL", total, config, f"{len(exclude)} of them are excluded")
    return found


def first_heldout(dataset: Dataset, config: Config, count: int, seed: int) -> list[Problem]:
    if count > len(dataset.heldout):
        raise _too_few(count, "held-out", len(dataset.heldout), config,
                       "ask for fewer (eval.problems, eval.final_problems), or hold out a larger task.heldout_share")
    problems = list(dataset.heldout)
    random.Random(f"{seed}/heldout").shuffle(problems)
    return problems[:count]


def _too_few(count: int, split: str, there: int, config: Config, way_out: str) -> ValueError:
    from reason_rl.data.problems import TooFewProblems

    return TooFewProblems(f"too few problems: {count} {split} ones of task {config.task.name!r} were asked for, but "
                          f"{config.task.path} and its filters leave {there}: {way_out}")
