"""Completions with any text, for a `Grader` under test."""

from __future__ import annotations

from collections.abc import Sequence

from reason_rl.config import Config
from reason_rl.records import Completion, FinishReason, Problem, Score
from reason_rl.reward import Grader


class Texts:
    """A stand-in for the tokenizer: a completion's first token refers to its whole text, the others are empty."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def completion(self, text: str, num_tokens: int = 10, finish_reason: FinishReason = "stop") -> Completion:
        self.texts.append(text)
        zeros = (0.0,) * num_tokens
        return Completion((len(self.texts) - 1, *(0,) * (num_tokens - 1)), zeros, zeros, finish_reason, policy_version=0,
                          sample_index=0)

    def decode_completion(self, token_ids: Sequence[int]) -> str:
        return self.texts[token_ids[0]]


def make_grader(config: Config, texts: Texts) -> Grader:
    return Grader(config, texts)  # type: ignore[arg-type]


def grade(problem: Problem, text: str, config: Config, num_tokens: int = 10, finish_reason: FinishReason = "stop") -> Score:
    texts = Texts()
    with make_grader(config, texts) as grader:
        return grader.submit(problem, texts.completion(text, num_tokens, finish_reason)).score()
