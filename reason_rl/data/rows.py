"""Reads a file task's JSONL files: finds them, checks each row, and turns rows into `Problem`s.

A row is one line of a file: a JSON object with the task's fields and an answer that its verifier can parse. A
bad row raises with file and line, or is left out and listed if task.on_bad_row is "skip". Left out: splits
and order (from_files.py); files that do not fit in memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from reason_rl.answers.ground_truth import why_unreadable
from reason_rl.config import ConfigError, TaskConfig
from reason_rl.data.prompts import load_template
from reason_rl.data.split import problem_id_of
from reason_rl.data.tasks.base import Exercise
from reason_rl.data.tasks.files import FILE_TASKS, RowError
from reason_rl.data.tokenizer import Tokenizer
from reason_rl.records import Problem


@dataclass
class RowReader:
    """Reads all files of one task, so that the rows left out of any of them are in one list."""

    config: TaskConfig
    verifier: str
    tokenizer: Tokenizer
    left_out: list[str] = field(default_factory=list)
    """"file:line: reason" of each row that is not used."""

    def exercises(self, path: Path) -> Iterator[tuple[str, Exercise]]:
        """(file:line, exercise) of each usable row; a repeated problem is left out."""
        seen: dict[str, tuple[str, Exercise]] = {}
        # Only b"\n" ends a row: a text may hold characters that str.splitlines takes for line ends.
        for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"

            # Parse the row, and compare it to an earlier one with the same prompt.
            try:
                exercise = self._exercise(line)
                if exercise is None:
                    continue
                first, same = seen.setdefault(" ".join(exercise.prompt.split()), (where, exercise))
                if same.answer != exercise.answer and self.verifier != "code":  # both may be right
                    raise RowError(f"it asks the same as {first}, with another answer")
            except RowError as error:
                self.reject(f"{where}: {error}")
                continue

            if first == where:
                yield where, exercise
            else:
                self.left_out.append(f"{where}: the same problem as {first}")

    def problems(self, rows: list[tuple[str, Exercise]]) -> Iterator[tuple[str, Exercise, Problem]]:
        """Adds the encoded problem to each row; leaves out prompts longer than task.max_prompt_tokens."""
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

    def reject(self, reason: str) -> None:
        """Raises or lists a bad row, as task.on_bad_row has it."""
        if self.config.on_bad_row == "raise":
            raise ConfigError(f"{reason}. (task.on_bad_row = 'skip' leaves such rows out and lists them.)")
        self.left_out.append(reason)

    def _exercise(self, line: bytes) -> Exercise | None:
        """None for a row that the config filters out, such as by task.math_levels."""
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


def find_files(task: TaskConfig) -> tuple[Path, Path | None]:
    """(the file of problems, the file of held-out problems or None)."""
    known, path = FILE_TASKS[task.name], Path(task.path)
    if not task.path:
        raise ConfigError(f"task {task.name!r} reads its problems from files: set task.path to a JSONL file, or to a folder with "
                          f"{' or '.join(known.train_names)} (and optionally {known.heldout_name}, the held-out problems)")
    heldout = Path(task.heldout_path) if task.heldout_path else None

    # In a folder, look for the task's usual file names.
    if path.is_dir():
        found = [path / name for name in known.train_names if (path / name).is_file()]
        if not found:
            raise ConfigError(f"no {' or '.join(known.train_names)} in task.path = {task.path!r}; there are "
                              f"{', '.join(sorted(one.name for one in path.iterdir())) or 'no files'}")
        if heldout is None and (path / known.heldout_name).is_file():
            heldout = path / known.heldout_name
        path = found[0]

    # Check that both exist and differ.
    for key, one in (("task.path", path), ("task.heldout_path", heldout)):
        if one is not None and not one.is_file():
            raise ConfigError(f"{key} names no file: {str(one)!r}")
    if heldout is not None and heldout.samefile(path):
        raise ConfigError(f"task.path and task.heldout_path are one file, {str(path)!r}: leave task.heldout_path out, and "
                          "task.heldout_share of the rows are held out")
    return path, heldout
