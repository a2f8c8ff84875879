"""`Problems`: the interface through which training and evaluation get their problems.

A GRPO step begins with `problems.train(step, count)`. The result depends on (run.seed, step, round) alone, so
every rank gets the same list and a resumed run continues with the problems that an uninterrupted one would
have had.
Implementations: generated.py draws from a task, from_files.py reads JSONL files. load.py chooses one.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable

from reason_rl.config import Config, ConfigError
from reason_rl.records import Problem


class TooFewProblems(ConfigError):
    """A split has fewer problems than were asked for."""


class Problems(ABC):
    """One task's problems in two disjoint splits, train and heldout. The defaults are a generated task's."""

    num_train: int | None = None
    """None if problems are generated without end."""
    num_heldout: int | None = None
    left_out: tuple[str, ...] = ()
    """Rows of the task's files that are not used, each with file, line and reason."""
    digest: str = ""
    """Hash of `all_known()`; changes with files, template and tokenizer. "" for a generated task."""

    @abstractmethod
    def train(self, step: int, count: int, round: int = 0, exclude: Collection[int] = ()) -> list[Problem]:
        """`count` distinct problems for one step; raises TooFewProblems if fewer are left.

        round: 0, then 1, 2, ... for the refills of dynamic sampling in the same step.
        exclude: ids of the problems that the step has already used. A repeated problem would sample the same
        completions again.
        """

    @abstractmethod
    def heldout(self, count: int, seed: int = 0) -> list[Problem]:
        """The first `count` held-out problems, in an order given by `seed` alone; raises TooFewProblems."""

    def all_known(self) -> list[Problem]:
        """All problems of the task's files: first train, then heldout. [] for a generated task."""
        return []

    def describe(self) -> list[str]:
        """Lines for a run to print about its problems."""
        return []

    def to_check(self, num_train: int, num_heldout: int) -> list[Problem]:
        """The problems to check before any work: all of a file, else the first step's and the evaluation's.

        Raises TooFewProblems if the first step or the evaluation cannot get as many as it needs.
        """
        drawn = self.train(0, num_train) + self.heldout(num_heldout)
        return self.all_known() or drawn

    def check(self, problems: Iterable[Problem], config: Config) -> None:
        """Raises if a prompt and its longest completion do not fit the model's context."""
        context, max_tokens = config.model.max_position_embeddings, config.sampling.max_tokens
        way_out = "" if self.num_train is None else "; task.max_prompt_tokens leaves longer ones out"
        for problem in problems:
            if len(problem.prompt_ids) > context - max_tokens:
                raise ConfigError(
                    f"the prompt {problem.prompt[:60]!r} has {len(problem.prompt_ids)} tokens, but model.max_position_embeddings = "
                    f"{context} less sampling.max_tokens = {max_tokens} leaves {context - max_tokens}{way_out}")


def problems_digest(problems: Iterable[Problem]) -> str:
    """Hash of everything that a prompt and its grading depend on."""
    text = "/".join(f"{problem.problem_id}:{problem.prompt_ids}:{problem.answer}:{dict(problem.facts)}" for problem in problems)
    return hashlib.blake2b(text.encode(errors="replace"), digest_size=8).hexdigest()
