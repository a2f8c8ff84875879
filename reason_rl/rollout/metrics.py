"""What graded groups say in numbers: the metrics of a step, of an evaluation, and pass@k."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import comb
from typing import NamedTuple

from reason_rl.config import Config
from reason_rl.data import Tokenizer
from reason_rl.records import Group, Score


class SampleFacts(NamedTuple):
    is_right: bool | None
    """None where accuracy could not be graded."""
    is_well_formed: bool
    num_thinking: int
    num_tokens: int
    is_truncated: bool


def mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def mean_of_known(values: Sequence[float | None]) -> float | None:
    return mean([value for value in values if value is not None])


def is_right(score: Score) -> bool | None:
    """All of the answer, not a part of it; None where accuracy could not be graded, which is no statement about the completion."""
    if not score.is_graded and "accuracy" not in score.parts:
        return None
    return score.parts.get("accuracy", 0.0) >= 1.0


def cause_of(text: str) -> str:
    """"accuracy raised: KeyError" -> "accuracy_raised"."""
    return text.partition(":")[0].replace(" ", "_")


def _causes(scores: Sequence[Score]) -> dict[str, float]:
    causes = Counter(cause_of(score.cause) for score in scores if not score.is_graded)
    return {f"ungraded/{cause}": float(count) for cause, count in sorted(causes.items())}


def sample_facts(groups: Sequence[Group], tokenizer: Tokenizer) -> list[SampleFacts]:
    return [
        SampleFacts(is_right(score), score.parts.get("format", 0.0) > 0.5,
                    tokenizer.thinking_tokens(completion.token_ids, group.problem.completion_prefix), len(completion.token_ids),
                    completion.finish_reason == "length")
        for group in groups
        for completion, score in zip(group.completions, group.scores, strict=True)
    ]


def _common(rows: Sequence[SampleFacts]) -> dict[str, float | None]:
    """Accuracies over the rows that have one, the rest over all."""
    thinkers = [row.is_right for row in rows if row.num_thinking > 0]
    others = [row.is_right for row in rows if row.num_thinking == 0]
    return {
        "accuracy": mean_of_known([row.is_right for row in rows]),
        "format_rate": mean([row.is_well_formed for row in rows]),
        "thinks_share": mean([row.num_thinking > 0 for row in rows]),
        "accuracy_given_thought": mean_of_known(thinkers),
        "accuracy_given_none": mean_of_known(others),
        "truncated_share": mean([row.is_truncated for row in rows]),
    }


def rollout_metrics(groups: Sequence[Group], tokenizer: Tokenizer) -> dict[str, float | None]:
    """Of an RL step's groups; means over the graded completions for rewards and accuracy, over all of them for the rest."""
    rows = sample_facts(groups, tokenizer)
    scores = [score for group in groups for score in group.scores]
    graded = [score for score in scores if score.is_graded]
    parts = {
        f"reward/{name}": mean([score.parts[name] for score in graded])
        for name in dict.fromkeys(name for score in graded for name in score.parts)
    }
    return {
        "reward": mean([score.value for score in graded]), **parts, **_common(rows),
        "length": mean([row.num_tokens for row in rows]),
        "thinking_tokens": mean([row.num_thinking for row in rows]),
        "ungraded": float(len(scores) - len(graded)), **_causes(scores),
    }


def update_metrics(updates: Sequence[dict[str, float]]) -> dict[str, float | None]:
    """Of a step's optimizer updates: means weighted by their tokens, extremes, and the gap of the first, which is on policy."""
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
    """Of held-out problems, over all samples; accuracy over those where it could be graded, the others are counted by cause."""
    rows = sample_facts(groups, tokenizer)
    scores = [score for group in groups for score in group.scores]
    return {
        "problems": len(groups), "samples": len(rows) // max(1, len(groups)), **_common(rows),
        "mean_thinking_tokens": mean([row.num_thinking for row in rows]),
        "mean_thinking_tokens_among_thinkers": mean([row.num_thinking for row in rows if row.num_thinking > 0]),
        "ungraded": sum(not score.is_graded for score in scores), **_causes(scores),
    }


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """The unbiased estimator of Chen et al. 2021 (arXiv:2107.03374, eq. 1): 1 - C(n - c, k) / C(n, k)."""
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass_at_k: k must be in 1..{num_samples}, got {k}")
    return 1.0 - comb(num_samples - num_right, k) / comb(num_samples, k)


def pass_at_powers(groups: Sequence[Group]) -> dict[str, float]:
    """{"1": .., "2": .., "4": ..}: mean pass@k, k the powers of two up to the number of samples, over the problems with k samples
    whose accuracy could be graded; no other samples count."""
    known = [[verdict for score in group.scores if (verdict := is_right(score)) is not None] for group in groups]
    largest = max(map(len, known), default=0)
    powers = [2**i for i in range(largest.bit_length()) if 2**i <= largest]
    estimates = {k: [pass_at_k(len(one), sum(one), k) for one in known if len(one) >= k] for k in powers}
    return {str(k): sum(values) / len(values) for k, values in estimates.items()}


def rollout_rows(
    groups: Sequence[Group], advantages: Sequence[Sequence[float]], tokenizer: Tokenizer, step: int, config: Config
) -> list[dict[str, object]]:
    """The lines of rollouts/step_NNNNNN.jsonl for the first run.rollout_samples groups."""
    return [
        {
            "step": step, "problem_id": group.problem.problem_id, "level": group.problem.level, "prompt": group.problem.prompt,
            "answer": group.problem.answer, "group": number, "sample": completion.sample_index,
            "text": tokenizer.decode_completion(completion.token_ids),
            "tokens": tokenizer.pieces(completion.token_ids),
            "logprobs": list(completion.logprobs), "advantage": advantage, "reward": score.value, "parts": dict(score.parts),
            "is_graded": score.is_graded, "cause": score.cause, "finish_reason": completion.finish_reason,
        }
        for number, (group, row) in enumerate(zip(groups, advantages, strict=True))
        if number < config.run.rollout_samples
        for completion, score, advantage in zip(group.completions, group.scores, row, strict=True)
    ]
