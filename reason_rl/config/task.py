"""The [task] section of a run's configuration: which problems, from where, and in what words. Part of config.py, which reads and
checks it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class TaskConfig:
    """program, countdown and your own tasks generate problems; gsm8k, math, code and jsonl read files: docs/tasks.md."""

    name: str = "program"
    """program | countdown | gsm8k | math | code | jsonl, or a generated task of your own as "module:Class"."""
    template: str = "plain"
    """What stands around a problem: plain | r1_zero | chat | few_shot, or the path of a .toml file of your own."""
    min_level: int = 5
    """Smallest difficulty of the problems that are made, in the task's own unit (lines, digits, numbers)."""
    max_level: int = 8
    heldout_share: float = 0.05
    """Share of all problems, by hash, that neither corpus nor RL ever sees; of a file, where no other has the held-out ones."""
    rl_share: float = 0.05
    """Share of the problems that are made, by hash, kept out of the corpus for RL."""
    operations: str = "+-*"
    """countdown: the operations that problems are made from."""
    path: str = ""
    """The JSONL file of the problems, or a folder with train.jsonl (code: or mbpp.jsonl), and test.jsonl for the held-out ones."""
    heldout_path: str = ""
    """The file of the held-out problems, where it stands elsewhere."""
    prompt_field: str = "prompt"
    """jsonl: the field with the problem's text."""
    answer_field: str = "answer"
    """jsonl: the field with the right answer, a text or a number."""
    math_levels: str = ""
    """math: only these levels, as "3,4,5"."""
    math_types: str = ""
    """math: only these types, as "Algebra,Geometry"."""
    code_shown_tests: int = 1
    """code: how many of its tests a problem shows. All of them are run, so a program cannot be written to the ones it knows."""
    on_bad_row: Literal["raise", "skip"] = "raise"
    """A row that is no problem (bad JSON, a missing field, an answer that its verifier cannot read) is an error, or is left out
    and listed."""
    max_prompt_tokens: int = 0
    """Problems with longer prompts are left out and listed; 0: one that does not fit the context is an error."""
    pass_rates: str = ""
    """A file of measured pass rates, as `python -m reason_rl.eval` writes it for each problem."""
    min_pass_rate: float = 0.0
    """RL takes no problem that was solved less often."""
    max_pass_rate: float = 1.0
    """RL takes no problem that was solved more often."""
    curriculum: Literal["none", "easy_first"] = "none"
    """"easy_first": each epoch goes from high pass rates to low ones, a tenth at a time."""
