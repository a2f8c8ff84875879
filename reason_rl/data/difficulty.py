"""Measured pass rates of problems, to filter and order a file task's problems by difficulty.

`python -m reason_rl.eval` writes them. A row is one problem: problem_id (or the prompt), num_samples,
num_right, and num_graded if some samples could not be graded. Rows of the same problem add up; a row without
graded samples is ignored.
A group whose completions are all right or all wrong has zero advantages, so a problem that the model always
or never solves costs time and gives no gradient.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reason_rl.config import ConfigError, TaskConfig
from reason_rl.records import Problem

NUM_BANDS = 10
"""Difficulty bands of the curriculum: pass rates from 0.9 up, from 0.8 up, ..."""


@dataclass(frozen=True)
class PassRates:
    path: str
    counts: Mapping[int | str, tuple[int, int]]
    """(number right, number graded) by problem_id, or by prompt for rows without an id."""

    def of(self, problem: Problem, text: str) -> float | None:
        """The pass rate, or None if there is none. text: the problem without its template."""
        found = next((self.counts[key] for key in (problem.problem_id, problem.prompt, text) if key in self.counts), None)
        return None if found is None else found[0] / found[1]


def read_pass_rates(path: str) -> PassRates:
    if not Path(path).is_file():
        raise ConfigError(f"task.pass_rates names no file: {path!r}")
    counts: dict[int | str, tuple[int, int]] = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        key, num_right, num_graded = _read_row(line, f"{path}:{number}")
        if num_graded:
            before = counts.get(key, (0, 0))
            counts[key] = (before[0] + num_right, before[1] + num_graded)
    return PassRates(path, counts)


def _read_row(line: str, where: str) -> tuple[int | str, int, int]:
    """-> (problem_id or prompt, number right, number graded)."""
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where}: not valid JSON: {error}") from error
    fields = row if isinstance(row, dict) else {}
    key = fields.get("problem_id", fields.get("prompt"))
    right, drawn = fields.get("num_right"), fields.get("num_samples")
    graded = fields.get("num_graded", drawn)
    if isinstance(key, int | str) and isinstance(right, int) and isinstance(graded, int) and isinstance(drawn, int) and (
        0 <= right <= graded <= drawn and drawn > 0
    ):
        return key, right, graded
    raise ConfigError(f"{where}: expected problem_id (a number) or prompt (text), num_samples from 1 up, and num_right from 0 to "
                      f"num_samples (or num_graded), got {line[:120]}")


def band_of(rate: float) -> int:
    """0 for the easiest band."""
    return NUM_BANDS - 1 - min(int(rate * NUM_BANDS), NUM_BANDS - 1)


def is_wanted(rate: float, config: TaskConfig) -> bool:
    return config.min_pass_rate <= rate <= config.max_pass_rate
