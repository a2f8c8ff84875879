"""Evaluation on held-out problems, before, during and after a stage: the log lines with phase "eval"."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from reason_rl.config import EvalConfig
from reason_rl.data import Problems, Tokenizer
from reason_rl.records import Group, SamplingParams
from reason_rl.report.clock import Clock
from reason_rl.rollout.collect import EVAL_KEY
from reason_rl.rollout.metrics import eval_metrics, pass_at_powers


def evaluate_heldout(
    settings: EvalConfig, problems: Problems, sampling: SamplingParams, tokenizer: Tokenizer,
    collect: Callable[..., list[Group]], num_done: int, num_steps: int, offset: int = 0,
) -> Mapping[str, Any] | None:
    """Metrics after `num_done` of `num_steps` steps; None if no evaluation is due. The first and the last
    evaluation use eval.final_problems and add pass@k, the others use eval.problems.

    collect: (problems, group_size, sampling, noise key, clock) -> graded groups.
    """
    # Which evaluation this is.
    is_whole = num_done in (0, num_steps)
    if not is_whole and (settings.every == 0 or num_done % settings.every):
        return None
    count, num_samples = ((settings.final_problems, settings.final_samples) if is_whole
                          else (settings.problems, settings.samples))

    # Accuracy, sampled without truncation.
    sampling = replace(sampling, temperature=settings.temperature, top_k=0, top_p=1.0, min_p=0.0)
    heldout, clock = problems.heldout(count), Clock()
    groups = collect(heldout, num_samples, sampling, EVAL_KEY + offset + num_done, clock)
    metrics: dict[str, Any] = {"split": "heldout", **eval_metrics(groups, tokenizer)}

    # pass@k, from more samples. A noise key contains the step, so these need a step that no other evaluation
    # uses.
    if is_whole and settings.pass_at_k:
        more = collect(heldout[: settings.problems], settings.pass_at_k, sampling, 2 * EVAL_KEY + offset + num_done, clock)
        metrics["pass_at_k"] = pass_at_powers(more)
    return metrics
