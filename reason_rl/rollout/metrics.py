"""Metrics of graded groups: of a training step, of a run's evaluation, and pass@k.

A completion that could not be graded counts neither as right nor as wrong: means of rewards and accuracy leave it out. A mean over
nothing is None.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from math import comb
from typing import NamedTuple

from reason_rl.data import Tokenizer
from reason_rl.records import Group, Microbatch, Score, StepStats
from reason_rl.report.clock import Clock
from reason_rl.rl.advantages import Advantages


class SampleFacts(NamedTuple):
    is_right: bool | None
    """None if accuracy could not be graded."""
    is_well_formed: bool
    num_thinking: int
    num_tokens: int
    is_truncated: bool


def mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def mean_of_known(values: Sequence[float | None]) -> float | None:
    return mean([value for value in values if value is not None])


def is_right(score: Score) -> bool | None:
    """Whether accuracy is full, not partial; None if accuracy could not be graded."""
    if not score.is_graded and "accuracy" not in score.parts:
        return None
    return score.parts.get("accuracy", 0.0) >= 1.0


def known_verdicts(group: Group) -> list[bool]:
    """Right or wrong, for the completions whose accuracy could be graded."""
    return [verdict for score in group.scores if (verdict := is_right(score)) is not None]


def count_causes(causes: Iterable[str]) -> dict[str, int]:
    """["accuracy raised: KeyError"] -> {"accuracy_raised": 1}, sorted by name."""
    counts = Counter(cause.partition(":")[0].replace(" ", "_") for cause in causes)
    return dict(sorted(counts.items()))


def sample_facts(groups: Sequence[Group], tokenizer: Tokenizer) -> list[SampleFacts]:
    """One for each completion, in order."""
    return [
        SampleFacts(is_right(score), score.parts.get("format", 0.0) > 0.5,
                    tokenizer.thinking_tokens(completion.token_ids, group.problem.completion_prefix), len(completion.token_ids),
                    completion.finish_reason == "length")
        for group in groups
        for completion, score in zip(group.completions, group.scores, strict=True)
    ]


def _common(facts: Sequence[SampleFacts]) -> dict[str, float | None]:
    """Metrics that a step and an evaluation both have."""
    return {
        "accuracy": mean_of_known([sample.is_right for sample in facts]),
        "format_rate": mean([sample.is_well_formed for sample in facts]),
        "thinks_share": mean([sample.num_thinking > 0 for sample in facts]),
        "accuracy_given_thought": mean_of_known([sample.is_right for sample in facts if sample.num_thinking > 0]),
        "accuracy_given_none": mean_of_known([sample.is_right for sample in facts if sample.num_thinking == 0]),
        "truncated_share": mean([sample.is_truncated for sample in facts]),
    }


def _causes(scores: Sequence[Score]) -> dict[str, float]:
    counts = count_causes(score.cause for score in scores if not score.is_graded)
    return {f"ungraded/{cause}": float(count) for cause, count in counts.items()}


def rollout_metrics(groups: Sequence[Group], tokenizer: Tokenizer) -> dict[str, float | None]:
    """Of a training step's groups. Rewards are means over the graded completions."""
    facts = sample_facts(groups, tokenizer)
    scores = [score for group in groups for score in group.scores]
    graded = [score for score in scores if score.is_graded]
    parts = {
        f"reward/{name}": mean([score.parts[name] for score in graded])
        for name in dict.fromkeys(name for score in graded for name in score.parts)
    }
    return {
        "reward": mean([score.value for score in graded]), **parts, **_common(facts),
        "length": mean([sample.num_tokens for sample in facts]),
        "thinking_tokens": mean([sample.num_thinking for sample in facts]),
        "ungraded": float(len(scores) - len(graded)), **_causes(scores),
    }


def update_metrics(updates: Sequence[dict[str, float]]) -> dict[str, float | None]:
    """Of a step's optimizer updates: means weighted by loss tokens, maxima and minima, and the first update's logprob gap.

    Only the first update is on policy, so only its gap compares the sampler with the trainer.
    """
    if not updates:
        return {"num_loss_tokens": 0.0}
    total = sum(update["num_loss_tokens"] for update in updates)
    merged: dict[str, float | None] = {}
    for name in updates[0]:
        values = [update[name] for update in updates if name in update]
        if name.endswith("_max") or name == "grad_norm":
            merged[name] = max(values)
        elif name.endswith("_min"):
            merged[name] = min(values)
        elif name == "num_loss_tokens":
            merged[name] = total
        else:
            merged[name] = sum(u[name] * u["num_loss_tokens"] for u in updates if name in u) / total
    merged["max_abs_logprob_gap"] = updates[0]["max_abs_logprob_gap"]
    return {name.removesuffix("_fraction"): value for name, value in merged.items()}


def eval_metrics(groups: Sequence[Group], tokenizer: Tokenizer) -> dict[str, float | None]:
    """Of a run's evaluation on held-out problems, over all samples."""
    facts = sample_facts(groups, tokenizer)
    scores = [score for group in groups for score in group.scores]
    return {
        "problems": len(groups), "samples": len(facts) // max(1, len(groups)), **_common(facts),
        "mean_thinking_tokens": mean([sample.num_thinking for sample in facts]),
        "mean_thinking_tokens_among_thinkers": mean([sample.num_thinking for sample in facts if sample.num_thinking > 0]),
        "ungraded": sum(not score.is_graded for score in scores), **_causes(scores),
    }


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """The unbiased estimator of Chen et al. 2021 (arXiv:2107.03374, eq. 1): 1 - C(n - c, k) / C(n, k)."""
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass_at_k: k must be in 1..{num_samples}, got {k}")
    return 1.0 - comb(num_samples - num_right, k) / comb(num_samples, k)


def pass_at_powers(groups: Sequence[Group]) -> dict[str, float]:
    """{"1": .., "2": .., "4": ..}: mean pass@k for k the powers of two up to the number of graded samples.

    Each mean is over the problems with at least k graded samples.
    """
    verdicts = [known_verdicts(group) for group in groups]
    most = max(map(len, verdicts), default=0)
    powers = [2**i for i in range(most.bit_length())]
    estimates = {k: [pass_at_k(len(one), sum(one), k) for one in verdicts if len(one) >= k] for k in powers}
    return {str(k): sum(values) / len(values) for k, values in estimates.items()}


def step_stats(
    step: int, groups: Sequence[Group], sampled: Sequence[Group], advantages: Advantages,
    minibatches: Sequence[Sequence[Microbatch]], updates: Sequence[dict[str, float]], tokenizer: Tokenizer, clock: Clock, *,
    lr: float, verifiers: Mapping[str, float],
) -> StepStats:
    """The record of one training step.

    groups: the batch. sampled: all groups of the step, with those that dynamic sampling replaced. clock: "step", and within it
    "rollout", "reward" and "train". verifiers: counts of the verifier service.
    """
    seconds = clock.seconds
    num_tokens = sum(len(completion.token_ids) for group in sampled for completion in group.completions)
    num_packed = sum(microbatch.num_tokens for microbatches in minibatches for microbatch in microbatches)
    timings = {
        "rollout_s": seconds["rollout"], "reward_s": seconds["reward"],
        **{f"verifier/{name}": value for name, value in verifiers.items()},
        "train_s": seconds["train"], "step_s": seconds["step"], "train_tok_s": num_packed / seconds["train"],
        "rollout_tok_s": num_tokens / seconds["rollout"], "step_tok_s": num_tokens / seconds["step"],
    }
    metrics = rollout_metrics(sampled, tokenizer) | update_metrics(updates) | {
        "lr": lr, "groups_without_signal": 1 - float(advantages.has_signal.float().mean())}
    return StepStats(step, metrics, timings, tuple(groups), tuple(map(tuple, advantages.advantages.tolist())))


def step_warnings(stats: StepStats, expected_gap: float) -> dict[str, str]:
    """Cause -> text: completions without a grade, and a gap between sampler and trainer above the expected one."""
    found: dict[str, str] = {}
    causes = [score.cause for group in stats.groups for score in group.scores if not score.is_graded]
    if causes:
        found["ungraded"] = (f"{len(causes)} completions could not be graded and take no part in the update (metric "
                             f"'ungraded' counts them). The first: {causes[0]}")
    gap = stats.metrics.get("max_abs_logprob_gap")
    if gap is not None and not gap <= expected_gap:  # NaN too
        found["gap"] = (f"sampler and trainer differ by {gap:.2g} nats on policy on this device; "
                        "rl.old_logprobs='recompute' with loss.importance='tis' corrects for it.")
    return found


def rollout_rows(
    groups: Sequence[Group], advantages: Sequence[Sequence[float]], tokenizer: Tokenizer, step: int
) -> list[dict[str, object]]:
    """The lines of a rollouts/ file: one per completion of the groups.

    advantages: by group and completion; those of further groups are ignored.
    """
    return [
        {
            "step": step, "problem_id": group.problem.problem_id, "level": group.problem.level, "prompt": group.problem.prompt,
            "answer": group.problem.answer, "group": number, "sample": completion.sample_index,
            "text": tokenizer.decode_completion(completion.token_ids),
            "tokens": tokenizer.pieces(completion.token_ids),
            "logprobs": list(completion.logprobs), "advantage": advantage, "reward": score.value, "parts": dict(score.parts),
            "is_graded": score.is_graded, "cause": score.cause, "finish_reason": completion.finish_reason,
        }
        for number, group in enumerate(groups)
        for completion, score, advantage in zip(group.completions, group.scores, advantages[number], strict=True)
    ]
