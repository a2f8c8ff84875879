"""Tasks read from files: turns a row of gsm8k, MATH, MBPP or any JSONL file into an exercise.

    gsm8k   question, answer: the right answer follows the last ####
    math    problem, solution (the right answer is its last box) or answer; level, type
    code    text, test_list; optionally test_setup_code, challenge_test_list, entry_points, code. The prompt
            shows the first tests, and a program must pass all of them
    jsonl   the fields that task.prompt_field and task.answer_field name

A bad row raises `RowError` with the reason; rows.py adds file and line. To add a task, write a function as
below and add a `FileTask` to `FILE_TASKS`. Left out: reading (rows.py), splitting and filtering
(from_files.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

from reason_rl.answers.ground_truth import find_answer
from reason_rl.config import TaskConfig
from reason_rl.data.tasks.base import Exercise

Row = Mapping[str, Any]


class RowError(ValueError):
    """Why a row is not a valid problem."""


@dataclass(frozen=True)
class FileTask:
    train_names: tuple[str, ...]
    """Names of its file in a folder; the first that exists is read."""
    heldout_name: str
    """Name of the optional file of held-out problems."""
    exercise: Callable[[Row, TaskConfig], Exercise | None]
    """Raises RowError for a bad row; None for a row that the config filters out."""


def gsm8k(row: Row, config: TaskConfig) -> Exercise:
    question, solution = text_of(row, "question"), text_of(row, "answer")
    steps, mark, answer = solution.rpartition("####")
    if not mark:
        raise RowError(f"its answer has no ####: {solution[-60:]!r}")
    return exercise_of(question, answer.strip(), level=len(steps.strip().splitlines()))


def math(row: Row, config: TaskConfig) -> Exercise | None:
    # Filter by level and type.
    problem, level, subject = text_of(row, "problem"), str(row.get("level", "")), str(row.get("type", ""))
    number = re.search(r"\d+", level)
    if config.math_levels and (number is None or number.group() not in _listed(config.math_levels)):
        return None
    if config.math_types and subject.casefold() not in _listed(config.math_types):
        return None

    # Take the answer, or find it in the solution.
    answer = text_of(row, "answer") if "answer" in row else find_answer(text_of(row, "solution"))
    if answer is None:
        raise RowError(f"its solution has no answer in a box: {row['solution'][-60:]!r}")
    return exercise_of(problem, answer.strip(), level=int(number.group()) if number else 0)


def code(row: Row, config: TaskConfig) -> Exercise:
    # A program is graded by all tests.
    problem, tests = text_of(row, "text"), texts_of(row, "test_list")
    if not tests:
        raise RowError("its test_list is empty")
    facts: dict[str, Any] = {"tests": [*tests, *texts_of({"challenge_test_list": [], **row}, "challenge_test_list")],
                             "setup": text_of({"test_setup_code": "", **row}, "test_setup_code")}
    if "entry_points" in row:
        facts["entry_points"] = texts_of(row, "entry_points")

    # The prompt shows the first ones, which name the function.
    shown = "\n".join(tests[: config.code_shown_tests])
    answer = text_of({"code": "", **row}, "code")  # an example of a right program
    return exercise_of(f"{problem}\nYour program must pass this:\n```python\n{shown}\n```", answer, key=problem, facts=facts)


def jsonl(row: Row, config: TaskConfig) -> Exercise:
    answer = row.get(config.answer_field)
    # pandas writes NaN for a missing answer.
    is_number = type(answer) is int or (type(answer) is float and isfinite(answer))
    given = {**row, config.answer_field: str(answer)} if is_number else row
    return exercise_of(text_of(given, config.prompt_field), text_of(given, config.answer_field).strip())


FILE_TASKS = {
    "gsm8k": FileTask(("train.jsonl",), "test.jsonl", gsm8k),
    "math": FileTask(("train.jsonl",), "test.jsonl", math),
    "code": FileTask(("train.jsonl", "mbpp.jsonl"), "test.jsonl", code),
    "jsonl": FileTask(("train.jsonl",), "test.jsonl", jsonl),
}


def field_of(row: Row, name: str) -> Any:
    if name not in row:
        raise RowError(f"it has no field {name!r}; there are {', '.join(row) or 'none'}")
    return row[name]


def texts_of(row: Row, name: str) -> list[str]:
    texts = field_of(row, name)
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise RowError(f"its {name!r} must be a list of texts, got {texts!r:.60}")
    return [_encodable(name, text) for text in texts]


def text_of(row: Row, name: str) -> str:
    if not isinstance(field_of(row, name), str):
        raise RowError(f"its {name!r} must be text, got {row[name]!r:.60}")
    return _encodable(name, str(row[name]))


def _encodable(name: str, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON may hold half of a surrogate pair, which no tokenizer accepts
        raise RowError(f"its {name!r} is not valid text: {error}") from error
    return text


def exercise_of(prompt: str, answer: str, level: int = 0, key: str = "", facts: Mapping[str, Any] | None = None) -> Exercise:
    if not prompt.strip():
        raise RowError("its problem is empty")
    return Exercise(prompt, level, answer, " ".join((key or prompt).split()).casefold(), facts or {})


def _listed(text: str) -> list[str]:
    return [one.strip().casefold() for one in text.split(",")]
