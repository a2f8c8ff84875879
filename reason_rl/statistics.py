"""What graded groups say in numbers: the metrics of a step, of an evaluation, and pass@k."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import comb
from typing import NamedTuple

from reason_rl.config import Config
from reason_rl.data import Tokenizer
from reason_rl.reward import thinking_tokens
from reason_rl.types import Group


class _Row(NamedTuple):
    is_right: bool
    is_well_formed: bool
    num_thinking: int
    num_tokens: int
    is_truncated: bool


def mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _rows(groups: Sequence[Group], tokenizer: Tokenizer) -> list[_Row]:
    opening, closing = tokenizer.think_open_id, tokenizer.think_close_id
    return [
        _Row(score.parts.get("accuracy", 0.0) > 0.5, score.parts.get("format", 0.0) > 0.5,
             thinking_tokens(completion.token_ids, opening, closing), len(completion.token_ids),
             completion.finish_reason == "length")
        for group in groups
        for completion, score in zip(group.completions, group.scores, strict=True)
    ]


def _common(rows: Sequence[_Row]) -> dict[str, float | None]:
    thinkers = [row for row in rows if row.num_thinking > 0]
    others = [row for row in rows if row.num_thinking == 0]
    return {
        "accuracy": mean([row.is_right for row in rows]),
        "format_rate": mean([row.is_well_formed for row in rows]),
        "thinks_share": mean([row.num_thinking > 0 for row in rows]),
        "accuracy_given_thought": mean([row.is_right for row in thinkers]),
        "accuracy_given_none": mean([row.is_right for row in others]),
        "truncated_share": mean([row.is_truncated for row in rows]),
    }


def rollout_metrics(groups: Sequence[Group], tokenizer: Tokenizer) -> dict[str, float | None]:
    """Of an RL step's groups; means over the graded completions for rewards, over all of them for the rest."""
    rows = _rows(groups, tokenizer)
    scores = [score for group in groups for score in group.scores]
    graded = [score for score in scores if score.is_graded]
    parts = {
        f"reward/{name}": mean([score.parts[name] for score in graded])
        for name in dict.fromkeys(name for score in graded for name in score.parts)
    }
    causes = Counter(score.cause.partition(":")[0].replace(" ", "_") for score in scores if not score.is_graded)
    return {
        "reward": mean([score.value for score in graded]), **parts, **_common(rows),
        "length": mean([row.num_tokens for row in rows]),
        "thinking_tokens": mean([row.num_thinking for row in rows]),
        "ungraded": float(len(scores) - len(graded)), **{f"ungraded/{cause}": float(n) for cause, n in sorted(causes.items())},
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
    """Of held-out problems, over all samples; one whose accuracy could not be graded counts as wrong."""
    rows = _rows(groups, tokenizer)
    return {
        "problems": len(groups), "samples": len(rows) // max(1, len(groups)), **_common(rows),
        "mean_thinking_tokens": mean([row.num_thinking for row in rows]),
        "mean_thinking_tokens_among_thinkers": mean([row.num_thinking for row in rows if row.num_thinking > 0]),
        "ungraded": sum(not score.is_graded for group in groups for score in group.scores),
    }


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """The unbiased estimator of Chen et al. 2021 (arXiv:2107.03374, eq. 1): 1 - C(n - c, k) / C(n, k)."""
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass_at_k: k must be in 1..{num_samples}, got {k}")
    return 1.0 - comb(num_samples - num_right, k) / comb(num_samples, k)


def pass_at_powers(groups: Sequence[Group]) -> dict[str, float]:
    """{"1": .., "2": .., "4": ..}: mean pass@k over the problems, k the powers of two up to the number of samples."""
    if not groups:
        return {}
    size = len(groups[0].completions)
    right = [sum(score.parts.get("accuracy", 0.0) > 0.5 for score in group.scores) for group in groups]
    powers = [2**i for i in range(size.bit_length()) if 2**i <= size]
    return {str(k): sum(pass_at_k(size, c, k) for c in right) / len(right) for k in powers}


def rollout_rows(
    groups: Sequence[Group], advantages: Sequence[Sequence[float]], tokenizer: Tokenizer, step: int, config: Config
) -> list[dict[str, object]]:
    """The lines of rollouts/step_NNNNNN.jsonl for the first run.rollout_samples groups."""
    return [
        {
            "step": step, "problem_id": group.problem.problem_id, "level": group.problem.level, "prompt": group.problem.prompt,
            "answer": group.problem.answer, "group": number, "sample": completion.sample_index,
            "text": tokenizer.decode_completion(completion.token_ids),
            "tokens": [tokenizer.token_text(token) for token in completion.token_ids],
            "logprobs": list(completion.logprobs), "advantage": advantage, "reward": score.value, "parts": dict(score.parts),
            "is_graded": score.is_graded, "cause": score.cause, "finish_reason": completion.finish_reason,
        }
        for number, (group, row) in enumerate(zip(groups, advantages, strict=True))
        if number < config.run.rollout_samples
        for completion, score, advantage in zip(group.completions, group.scores, row, strict=True)
    ]
