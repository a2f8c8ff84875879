"""The [task] section: which problems a run uses, from which source, and in which template."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class TaskConfig:
    """program, countdown and your own tasks generate problems; gsm8k, math, code and jsonl read files."""

    name: str = "program"
    """program | countdown | gsm8k | math | code | jsonl, or your own generated task as "module:Class"."""
    template: str = "plain"
    """Prompt text around a problem: plain | r1_zero | chat | few_shot, or the path of your own .toml file."""
    min_level: int = 5
    """Smallest difficulty of generated problems, in the task's unit (lines, numbers)."""
    max_level: int = 8
    """Largest difficulty of generated problems."""
    heldout_share: float = 0.05
    """Share of problems, chosen by hash, kept for evaluation. File tasks with a held-out file ignore it."""
    rl_share: float = 0.05
    """Generated tasks: share of problems, chosen by hash, that RL uses and the corpus leaves out."""
    operations: str = "+-*"
    """countdown: the operations in generated problems."""
    path: str = ""
    """File tasks: a JSONL file of problems, or a folder with train.jsonl (code: or mbpp.jsonl) and optionally
    test.jsonl, the held-out problems."""
    heldout_path: str = ""
    """File tasks: the JSONL file of held-out problems, instead of the folder's test.jsonl."""
    prompt_field: str = "prompt"
    """jsonl: the field with the problem's text."""
    answer_field: str = "answer"
    """jsonl: the field with the right answer, a text or a number."""
    math_levels: str = ""
    """math: keep only these levels, as "3,4,5"; empty: all."""
    math_types: str = ""
    """math: keep only these types, as "Algebra,Geometry"; empty: all."""
    code_shown_tests: int = 1
    """code: tests that the prompt shows. Grading runs all tests, so passing the shown ones is not enough."""
    on_bad_row: Literal["raise", "skip"] = "raise"
    """A row that is not a valid problem (bad JSON, a missing field, an answer that its verifier cannot read):
    "raise" stops with an error, "skip" leaves it out and lists it."""
    max_prompt_tokens: int = 0
    """File tasks: leave out and list problems with longer prompts. 0: no limit; a prompt that does not fit
    the context is an error."""
    pass_rates: str = ""
    """File tasks: a file of measured pass rates per problem, as `python -m reason_rl.eval` writes it."""
    min_pass_rate: float = 0.0
    """Leave problems with a lower pass rate out of RL."""
    max_pass_rate: float = 1.0
    """Leave problems with a higher pass rate out of RL."""
    curriculum: Literal["none", "easy_first"] = "none"
    """Order in an epoch. "none": shuffled. "easy_first": bands of 0.1 pass rate, easiest first."""
