"""The numbers of an evaluation: a row for each problem, then pass@k, cons@k and means over all rows, each with an interval.

`problem_row` is called for each graded group; `summarise` reads rows only, so the result does not depend on how often the
evaluation was interrupted. Letters: n samples of a problem, k of them at a time. docs/evaluation.md explains each number.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from reason_rl.answers.verdict import Verdict
from reason_rl.data import Tokenizer
from reason_rl.records import Group
from reason_rl.rollout.metrics import count_causes, known_verdicts, mean, mean_of_known, pass_at_k, sample_facts

Row = Mapping[str, Any]
NUM_RESAMPLES = 2000
"""Bootstrap draws. The ends of an interval are quantiles over them, with a standard error of 3 % of its half-width."""
BOOTSTRAP_KEY = 20_070_403


def problem_row(group: Group, answers: Sequence[str | None], votes: Verdict | None, tokenizer: Tokenizer) -> dict[str, Any]:
    """A graded group as a line of problems.jsonl.

    answers: of each sample, None if it has none. votes: `group_answers` of the samples that may vote, in order; None if the
    verifier's answers cannot be compared. A sample's "vote" is the index of the first sample with the same answer.
    """
    # Votes count the voters only: translate their places to indices of samples.
    voters = [n for n, sample in enumerate(group.completions) if may_vote(answers[n], sample.finish_reason)]
    first_same = votes.parts if votes is not None and votes.is_graded else {}
    vote = {n: voters[int(first_same[str(place)])] for place, n in enumerate(voters) if str(place) in first_same}
    votes_missing = "not compared" if votes is None else "" if votes.is_graded else f"{votes.cause}: {votes.detail}"

    samples = [
        {"text": tokenizer.decode_completion(completion.token_ids), "is_right": facts.is_right, "answer": answers[n],
         "vote": vote.get(n), "is_well_formed": facts.is_well_formed, "tokens": facts.num_tokens,
         "thinking_tokens": facts.num_thinking, "finish_reason": completion.finish_reason, "logprob": sum(completion.logprobs),
         "cause": score.cause}
        for n, (completion, score, facts) in enumerate(
            zip(group.completions, group.scores, sample_facts([group], tokenizer), strict=True))]
    problem, verdicts = group.problem, known_verdicts(group)
    return {"problem_id": problem.problem_id, "prompt": problem.prompt, "answer": problem.answer, "level": problem.level,
            "num_samples": len(samples), "num_graded": len(verdicts), "num_right": sum(verdicts), "pass_rate": mean(verdicts),
            "votes_missing": votes_missing, "samples": samples}


def may_vote(answer: str | None, finish_reason: str) -> bool:
    """A truncated completion may contain an answer that it would have revised."""
    return answer is not None and finish_reason == "stop"


def pass_rate(row: Row, k: int) -> float | None:
    """The unbiased pass@k of one problem over its graded samples; None if fewer than k were graded."""
    return pass_at_k(row["num_graded"], row["num_right"], k) if row["num_graded"] >= k else None


def consensus(row: Row, k: int) -> float | None:
    """cons@k of one problem: the fraction of its n // k disjoint runs of k samples whose majority is right; None if unknown."""
    if row["votes_missing"]:
        return None
    samples = row["samples"]
    return mean_of_known([majority(samples[start : start + k]) for start in range(0, len(samples) - k + 1, k)])


def majority(samples: Sequence[Row]) -> bool | None:
    """Whether the most frequent answer is right; among equally frequent ones the first wins.

    False if no sample votes, None if the winning answer could not be graded.
    """
    counts = Counter(sample["vote"] for sample in samples if sample["vote"] is not None)
    if not counts:
        return False
    winner = max(counts, key=lambda vote: counts[vote])  # max() takes the first of equals, a Counter iterates in order of arrival
    return next((s["is_right"] for s in samples if s["vote"] == winner and s["is_right"] is not None), None)


def estimate(values: Sequence[float | None]) -> dict[str, float | int | None]:
    """One value per problem (None: unknown) -> their mean, its 95 % bootstrap interval, and the number of known values.

    Problems are resampled with replacement: the interval is about other problems of the same distribution. Fewer than 2 known
    values have no interval.
    """
    known = np.array([value for value in values if value is not None], dtype=np.float64)
    if len(known) < 2:
        return {"mean": float(known[0]) if len(known) else None, "low": None, "high": None, "problems": len(known)}
    generator = np.random.default_rng((BOOTSTRAP_KEY, len(known)))
    means = [known[generator.integers(len(known), size=len(known))].mean() for _ in range(NUM_RESAMPLES)]
    low, high = np.quantile(means, (0.025, 0.975))
    return {"mean": float(known.mean()), "low": float(low), "high": float(high), "problems": len(known)}


def summarise(rows: Sequence[Row], ks: Sequence[int]) -> dict[str, Any]:
    """Over all rows, in the problems' order: estimates over problems, counts over samples."""
    samples = [sample for row in rows for sample in row["samples"]]

    def mean_over_problems(key: str) -> dict[str, float | int | None]:
        return estimate([mean([float(sample[key]) for sample in row["samples"]]) for row in rows])

    causes = count_causes(sample["cause"] for sample in samples if sample["cause"])
    return {
        "problems": len(rows), "samples": max((row["num_samples"] for row in rows), default=0),
        "pass_at_k": {str(k): estimate([pass_rate(row, k) for row in rows]) for k in ks},
        "cons_at_k": {str(k): estimate([consensus(row, k) for row in rows]) for k in ks if k > 1},
        "thinking_tokens": mean_over_problems("thinking_tokens"), "length": mean_over_problems("tokens"),
        "format_rate": mean_over_problems("is_well_formed"),
        "completions": len(samples),
        "truncated": sum(sample["finish_reason"] == "length" for sample in samples),
        "without_answer": sum(sample["answer"] is None for sample in samples),
        "ungradable": sum(causes.values()), "ungradable_causes": causes,
        "votes_missing": dict(sorted(Counter(row["votes_missing"] for row in rows if row["votes_missing"]).items())),
    }
