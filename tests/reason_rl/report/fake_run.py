"""A made-up run folder for the tests of the page and the plot: 2,000 pretraining steps, then 90 GRPO steps.

Its curves follow those of a real run: the base model mostly guesses, and accuracy rises within about twenty
steps. The numbers come from `random.Random` with a fixed seed, so they are the same on every machine.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from reason_rl.report.log import RunLog

STEPS = 90
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
CAUSE = "custom: ValueError: no digits <b>here</b>"
"""Why the last completion of step 1's first group was not graded; all others were."""


def learned(step: int) -> float:
    """0 before accuracy rises, 1 after."""
    return 1 / (1 + math.exp(-(step - 13) / 4.5))


def train_metrics(step: int, rng: random.Random) -> dict[str, Any]:
    skill = learned(step)
    accuracy = 0.16 + 0.8 * skill + rng.gauss(0, 0.02)
    entropy = 0.62 * (1 - skill) + 0.07 + rng.gauss(0, 0.008)
    return {
        "reward": accuracy + 0.098, "reward/accuracy": accuracy, "reward/format": min(1.0, 0.97 + 0.02 * skill),
        "reward/overlong": -0.02 * rng.random(), "accuracy": accuracy, "length": 10 + 27 * skill + rng.gauss(0, 0.6),
        "thinking_tokens": 2.8 + 27 * skill + rng.gauss(0, 0.5), "thinks_share": min(1.0, 0.13 + 0.87 * skill),
        "accuracy_given_thought": min(1.0, 0.62 + 0.36 * skill + rng.gauss(0, 0.03)),
        "accuracy_given_none": max(0.0, 0.11 + rng.gauss(0, 0.02)) if skill < 0.99 else None,
        "format_rate": min(1.0, 0.97 + 0.02 * skill), "truncated_share": max(0.0, rng.gauss(0.01, 0.006)),
        "ungraded": int(step == 1),
        "groups_without_signal": min(1.0, 0.1 + 0.5 * skill), "loss": rng.gauss(0, 0.01),
        "grad_norm": 0.4 + rng.random() * 0.3, "lr": 3e-4 * (1 - step / STEPS), "entropy": entropy, "kl": 0.02 * skill,
        "approx_kl": 0.001 * rng.random(),
        "clip_low": 0.004 * rng.random(), "clip_high": 0.02 * rng.random(), "ratio_max": 1.5 + rng.random(),
        "ratio_min": 0.4 + 0.2 * rng.random(), "max_abs_logprob_gap": 2e-6 * rng.random(), "ess": 0.98,
        "num_loss_tokens": int(2560 + 7000 * skill),
    }


def eval_metrics(step: int, with_pass_at_k: bool, seed: int = 0) -> dict[str, Any]:
    skill = learned(step - 2 * seed) * (1 - 0.015 * seed)
    values: dict[str, Any] = {
        "split": "heldout", "problems": 500 if step in (0, STEPS) else 100, "samples": 4,
        "accuracy": 0.165 + 0.795 * skill, "format_rate": 0.97 + 0.02 * skill, "mean_thinking_tokens": 2.9 + 27 * skill,
        "thinks_share": 0.13 + 0.87 * skill, "mean_thinking_tokens_among_thinkers": 22 + 8 * skill,
        "accuracy_given_thought": 0.62 + 0.36 * skill, "accuracy_given_none": 0.11 if skill < 0.99 else None,
        "truncated_share": 0.01,
    }
    if with_pass_at_k:
        single = values["accuracy"]
        values["pass_at_k"] = {str(k): 1 - (1 - single) ** (k ** 0.9) for k in (1, 2, 4, 8, 16)}
    return values


def rollout_rows(step: int, rng: random.Random, groups: int = 4, group_size: int = 8) -> list[dict[str, Any]]:
    rows = []
    for group in range(groups):
        names = "abcdefgh"[: rng.randint(4, 8)]
        operations = [rng.choice("+-*") + str(rng.choice([1, 3, 7, 9])) for _ in names]
        values, value = [], 0
        for operation in operations:
            number = int(operation[1:])
            change = {"+": value + number, "-": value - number, "*": (value or 1) * number}
            value = change[operation[0]] % 10
            values.append(value)
        prompt = ",".join(n + o for n, o in zip(names, operations)) + "?"
        answer = str(values[-1])
        scores = [1.1 if rng.random() < 0.16 + 0.8 * learned(step) else 0.1 for _ in range(group_size)]
        mean = sum(scores) / group_size
        spread = math.sqrt(sum((s - mean) ** 2 for s in scores) / group_size) + 1e-6
        for sample, score in enumerate(scores):
            thinks = rng.random() < 0.13 + 0.87 * learned(step)
            work = ",".join(f"{n}{o}={v}" for n, o, v in zip(names, operations, values)) if thinks else ""
            given = answer if score > 1 else str((int(answer) + rng.randint(1, 9)) % 10)
            tokens = ["<think>", *work, "</think>", "<answer>", given, "</answer>", "<eos>"]
            is_graded = (step, group, sample) != (1, 0, 7)
            rows.append({
                "step": step, "problem_id": 1000 * step + group, "level": len(names), "prompt": prompt,
                "answer": answer, "group": group, "sample": sample, "text": "".join(tokens[:-1]), "tokens": tokens,
                "logprobs": [-abs(rng.gauss(0, 1.6 if rng.random() < 0.2 else 0.05)) for _ in tokens],
                "advantage": (score - mean) / spread, "reward": score,
                "parts": {"accuracy": 1.0 if score > 1 else 0.0, "format": 1.0, "overlong": 0.0}, "is_graded": is_graded,
                "cause": "" if is_graded else CAUSE,
                "finish_reason": "stop",
            })
    return rows


def write_fake_run(folder: Path, seed: int = 0, hostile: bool = False) -> Path:
    """A finished run's folder. `hostile` puts markup and scripts into every text of a model or a user."""
    rng = random.Random(f"{seed}/fake-run")
    log = RunLog(folder, tensorboard=False)
    for step in range(0, 2001, 10):
        loss = 0.55 + 2.9 * math.exp(-step / 220) + rng.gauss(0, 0.02)
        log.metrics("pretrain", "train", step, {
            "loss": loss, "lr": 2e-3 * (1 - step / 2001), "grad_norm": 0.5 + rng.random() * 0.2,
            "tokens": 2048 * step, "balance": 1.0 + 0.1 * rng.random()})
        log.timings("pretrain", "train", step, {"step_s": 0.07, "train_tok_s": 29000 + rng.gauss(0, 800)})
    log.metrics("grpo", "eval", 0, eval_metrics(0, with_pass_at_k=True, seed=seed))
    log.timings("grpo", "eval", 0, {"eval_s": 4.0})
    for step in range(1, STEPS + 1):
        log.metrics("grpo", "train", step, train_metrics(step, rng))
        rollout_s, train_s = 0.2 + 0.1 * learned(step), 0.15 + 0.17 * learned(step)
        log.timings("grpo", "train", step, {
            "rollout_s": rollout_s, "reward_s": 0.01, "train_s": train_s, "step_s": rollout_s + train_s + 0.02,
            "rollout_tok_s": 32000 + rng.gauss(0, 1500), "train_tok_s": 30000 + rng.gauss(0, 1500), "step_tok_s": 15500.0})
        if step % 10 == 0:
            log.metrics("grpo", "eval", step, eval_metrics(step, with_pass_at_k=step == STEPS, seed=seed))
            log.timings("grpo", "eval", step, {"eval_s": 1.1})
        if step == 1 or step % 10 == 0:
            log.rollouts("grpo", step, [_hostile(row) if hostile else row for row in rollout_rows(step, rng)])
    log.close()
    first, last = eval_metrics(0, False, seed), eval_metrics(STEPS, False, seed)
    (folder / "summary.json").write_text(json.dumps({
        "base_accuracy": first["accuracy"], "final_accuracy": last["accuracy"],
        "base_mean_thinking_tokens": first["mean_thinking_tokens"],
        "final_mean_thinking_tokens": last["mean_thinking_tokens"],
        "base_thinks_share": first["thinks_share"], "final_thinks_share": last["thinks_share"],
        "final_format_rate": last["format_rate"], "wall_s": 214.6, "seed": seed, "max_abs_logprob_gap": 1.9e-6}),
        encoding="utf-8")
    name = HOSTILE if hostile else "program"
    (folder / "config.toml").write_text(
        f'[run]\nname = {json.dumps(name)}\nseed = {seed}\n\n[[stage]]\nkind = "pretrain"\n\n'
        f'[[stage]]\nkind = "grpo"\n\n[stage.rl]\nsteps = {STEPS}\n', encoding="utf-8")
    return folder


def _hostile(row: dict[str, Any]) -> dict[str, Any]:
    tokens = ["<think>", HOSTILE, "\u2028", "{{ 7 * 7 }}", "<!--<script>", "\ud800", "\n", "</think>"]
    return row | {"prompt": HOSTILE, "answer": HOSTILE, "tokens": tokens, "text": "".join(tokens),
                  "logprobs": [-0.5] * len(tokens), "parts": {HOSTILE: 1.0}}
