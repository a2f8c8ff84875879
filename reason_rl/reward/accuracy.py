"""The accuracy reward: is the answer right?

The answer is what stands in the completion's one answer block, white space around it aside. A completion without an
answer block, or with more than one opening or closing answer tag, has no answer and gets 0: several answers would be
several guesses. Whether the rest keeps the template is format.py's to say.

Most tasks compare texts. A task with many right answers has a verifier of its own in `VERIFIERS`.
"""

from __future__ import annotations

from collections.abc import Callable

from reason_rl.reward.countdown import is_countdown_solution
from reason_rl.types import Problem


def accuracy_reward(problem: Problem, text: str) -> float:
    """1.0 or 0.0."""
    answer = extract_answer(text)
    return 1.0 if answer is not None and VERIFIERS.get(problem.task, same_text)(problem, answer) else 0.0


def extract_answer(text: str) -> str | None:
    """The inside of the one answer block, stripped; None when there is not exactly one."""
    if text.count("<answer>") != 1 or text.count("</answer>") != 1:
        return None
    _, _, rest = text.partition("<answer>")
    answer, closing, _ = rest.partition("</answer>")
    return answer.strip() if closing else None


def same_text(problem: Problem, answer: str) -> bool:
    return answer == problem.answer


def solves_countdown(problem: Problem, answer: str) -> bool:
    return is_countdown_solution(answer, problem.facts["numbers"], problem.facts["target"])


VERIFIERS: dict[str, Callable[[Problem, str], bool]] = {"countdown": solves_countdown}
