"""What an evaluation measures: a row for each problem, and from all rows pass@k, cons@k and means, each with its interval.

eval.py samples, grades and calls `problem_row`; `summarise` reads rows alone, so that an evaluation in several sittings says what
one in a single sitting says. Letters: n samples of a problem, k of them at a time. docs/evaluation.md has the words for users.

Left out: sampling, files, the table (eval.py); what a run says of itself along the way (statistics.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from reason_rl.answers.verdict import Verdict
from reason_rl.data import Tokenizer
from reason_rl.records import Group
from reason_rl.rollout.metrics import cause_of, mean_of_known, pass_at_k, sample_facts

Row = Mapping[str, Any]
RESAMPLES = 2000
"""Bootstrap draws; the standard error of an interval's ends, which are quantiles of them, is then 3 % of its half-width."""
BOOTSTRAP_KEY = 20_070_403


def problem_row(group: Group, answers: Sequence[str | None], votes: Verdict | None, tokenizer: Tokenizer) -> dict[str, Any]:
    """A graded group as a line of problems.jsonl.

    answers: of each sample, None where it has none. votes: of the samples that have one and were not truncated, in order, which of
    them say the same (answers/votes.py); None for a verifier whose answers are not compared.
    """
    problem = group.problem
    voters = [n for n, sample in enumerate(group.completions) if may_vote(answers[n], sample.finish_reason)]
    groups = votes.parts if votes is not None and votes.is_graded else {}
    vote = {n: voters[int(groups[str(place)])] for place, n in enumerate(voters) if str(place) in groups}
    samples = [
        {"text": tokenizer.decode_completion(completion.token_ids), "is_right": facts.is_right, "answer": answers[n],
         "vote": vote.get(n), "is_well_formed": facts.is_well_formed, "tokens": facts.num_tokens,
         "thinking_tokens": facts.num_thinking, "finish_reason": completion.finish_reason, "logprob": sum(completion.logprobs),
         "cause": score.cause}
        for n, (completion, score, facts) in enumerate(
            zip(group.completions, group.scores, sample_facts([group], tokenizer), strict=True))]
    known = [bool(sample["is_right"]) for sample in samples if sample["is_right"] is not None]
    unknown = "not compared" if votes is None else "" if votes.is_graded else f"{votes.cause}: {votes.detail}"
    return {"problem_id": problem.problem_id, "prompt": problem.prompt, "answer": problem.answer, "level": problem.level,
            "num_samples": len(samples), "num_graded": len(known), "num_right": sum(known),
            "pass_rate": sum(known) / len(known) if known else None, "votes_missing": unknown, "samples": samples}


def may_vote(answer: str | None, finish_reason: str) -> bool:
    return answer is not None and finish_reason == "stop"


def pass_rate(row: Row, k: int) -> float | None:
    """The unbiased pass@k of one problem, from those of its samples that could be graded; None where they are fewer than k."""
    return pass_at_k(row["num_graded"], row["num_right"], k) if row["num_graded"] >= k else None


def consensus(row: Row, k: int) -> float | None:
    """cons@k of one problem: how often a vote of k samples finds the right answer, the mean over the n // k disjoint runs of k."""
    if row["votes_missing"]:
        return None
    samples = row["samples"]
    return mean_of_known([majority(samples[start : start + k]) for start in range(0, len(samples) - k + 1, k)])


def majority(samples: Sequence[Row]) -> bool | None:
    """Whether the answer that most of them give is right; of those equally frequent, the one seen first. Nobody's answer is wrong,
    and None says that the winner could not be graded."""
    counts = Counter(sample["vote"] for sample in samples if sample["vote"] is not None)
    if not counts:
        return False
    winner = max(counts, key=lambda vote: counts[vote])  # the first of the largest, and a Counter keeps the order of arrival
    return next((s["is_right"] for s in samples if s["vote"] == winner and s["is_right"] is not None), None)


def estimate(values: Sequence[float | None]) -> dict[str, float | int | None]:
    """Of one value a problem (None: unknown) -> their mean, the ends of its 95 % bootstrap interval, and how many were known.

    Problems are resampled with replacement: the interval is about other problems of the same kind. Fewer than 2 have none.
    """
    known = np.array([value for value in values if value is not None], dtype=np.float64)
    if len(known) < 2:
        return {"mean": float(known[0]) if len(known) else None, "low": None, "high": None, "problems": len(known)}
    generator = np.random.default_rng((BOOTSTRAP_KEY, len(known)))
    means = [known[generator.integers(len(known), size=len(known))].mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, (0.025, 0.975))
    return {"mean": float(known.mean()), "low": float(low), "high": float(high), "problems": len(known)}


def summarise(rows: Sequence[Row], ks: Sequence[int]) -> dict[str, Any]:
    """Of all rows, in the problems' order: estimates by problem, and counts of samples."""
    samples = [sample for row in rows for sample in row["samples"]]

    def mean_of(value: str) -> dict[str, float | int | None]:
        return estimate([mean_of_known([float(sample[value]) for sample in row["samples"]]) for row in rows])

    causes = Counter(cause_of(sample["cause"]) for sample in samples if sample["cause"])
    return {
        "problems": len(rows), "samples": max((row["num_samples"] for row in rows), default=0),
        "pass_at_k": {str(k): estimate([pass_rate(row, k) for row in rows]) for k in ks},
        "cons_at_k": {str(k): estimate([consensus(row, k) for row in rows]) for k in ks if k > 1},
        "thinking_tokens": mean_of("thinking_tokens"), "length": mean_of("tokens"), "format_rate": mean_of("is_well_formed"),
        "completions": len(samples),
        "truncated": sum(sample["finish_reason"] == "length" for sample in samples),
        "without_answer": sum(sample["answer"] is None for sample in samples),
        "ungradable": sum(causes.values()), "ungradable_causes": dict(sorted(causes.items())),
        "votes_missing": dict(sorted(Counter(row["votes_missing"] for row in rows if row["votes_missing"]).items())),
    }
