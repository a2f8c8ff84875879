"""Token columns for grpo_loss's tests, and its formula as plain loops in float64.

The loops apply the op's formula token by token, with the sequence ratio differentiated through its mean;
tests/reason_rl/rl/test_algorithms.py has the formulas of the papers.
"""

from __future__ import annotations

from typing import Any

import torch

from kernels.grpo_loss import LossInputs, LossSpec, grpo_loss, make_inputs

PER_TOKEN = ("logprobs", "old_logprobs", "advantages", "rollout_logprobs", "ref_logprobs", "entropy")


def uneven(dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    return make_inputs(dtype=dtype)["uneven"]


def arguments(inputs: dict[str, Any]) -> tuple[torch.Tensor, LossInputs, torch.Tensor | None]:
    """A dict of columns -> (logprobs, inputs, entropy)."""
    constants = {name: value for name, value in inputs.items() if name not in ("logprobs", "entropy")}
    return inputs["logprobs"], LossInputs(**constants), inputs.get("entropy")


def loss_of(inputs: dict[str, Any], spec: LossSpec, impl: str = "auto") -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    logprobs, constants, entropy = arguments(inputs)
    return grpo_loss(logprobs, constants, spec, entropy, impl)


def rows_of(inputs: dict[str, Any], sequence: int) -> list[int]:
    return [n for n, s in enumerate(inputs["sequence_index"].tolist()) if s == sequence]


def by_hand(inputs: dict[str, Any], spec: LossSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss by loops over sequences and tokens on f64 scalars, and its gradient in the logprobs."""
    leaf = inputs["logprobs"].double().clone().requires_grad_()
    lp = list(leaf.unbind())
    old, rollout, ref, advantage, entropy = (
        inputs[k].double().tolist()
        for k in ("old_logprobs", "rollout_logprobs", "ref_logprobs", "advantages", "entropy"))
    zero = torch.zeros((), dtype=torch.float64)
    total = leaf.sum() * 0
    for sequence in range(inputs["num_sequences"]):
        rows = rows_of(inputs, sequence)
        for n in rows:
            peers = rows if spec.ratio == "sequence" else [n]
            ratio = torch.exp(sum(((lp[m] - old[m]) for m in peers), zero) / len(peers))
            w = float(torch.exp(sum((zero + old[m] - rollout[m] for m in peers), zero) / len(peers)))
            a = advantage[n]
            clipped = min(max(ratio, zero + 1 - spec.clip_low), zero + 1 + spec.clip_high)
            if spec.surrogate == "reinforce":
                objective = a * lp[n]
            elif spec.surrogate == "cispo":
                objective = clipped.item() * a * lp[n]
            else:
                objective = min(ratio * a, clipped * a)
                if spec.dual_clip and a < 0:
                    objective = max(objective, zero + spec.dual_clip * a)
            if spec.importance == "tis":
                objective = objective * min(w, spec.importance_high)
            elif spec.importance == "icepop":
                objective = objective * (w if spec.importance_low <= w <= spec.importance_high else 0.0)
            d = ref[n] - lp[n]
            kl = {"k1": -d, "k2": d * d / 2, "k3": torch.exp(d) - 1 - d}[spec.kl_estimator]
            token_loss = -objective + spec.kl_coef * kl - spec.entropy_coef * entropy[n]
            denominator = {
                "token": inputs["total_loss_tokens"],
                "sequence": len(rows) * inputs["total_sequences"],
                "constant": inputs["total_sequences"] * spec.constant_length,
            }[spec.normalizer]
            total = total + token_loss / denominator
    return total.detach(), torch.autograd.grad(total, leaf)[0]


def small() -> dict[str, Any]:
    """Few tokens, chosen so that every clip and mask applies to some of them and not to all."""
    f64 = torch.float64
    old = torch.tensor([-1.0, -0.5, -2.0, -0.2, -1.5, -0.7, -0.1, -3.0], dtype=f64)
    index = torch.tensor([0, 0, 0, 1, 3, 3, 3, 4], dtype=torch.int32)  # sequence 2 has no tokens
    return {
        "old_logprobs": old,
        "logprobs": old + torch.tensor([0.5, 0.4, -0.6, -0.1, 0.9, 1.3, 0.8, -0.9], dtype=f64),
        "rollout_logprobs": old - torch.tensor([0.1, 0.9, -0.2, 0.0, -0.8, 0.3, -1.2, 1.0], dtype=f64),
        "ref_logprobs": old + torch.tensor([0.3, -0.3, 0.2, 0.6, -0.5, 0.1, 0.05, 0.7], dtype=f64),
        "entropy": torch.linspace(0.1, 1.5, 8, dtype=f64),
        "advantages": torch.tensor([1.3, -0.7, 9.0, -1.1, -0.4], dtype=f64).index_select(0, index),
        "sequence_index": index, "num_sequences": 5, "total_loss_tokens": 20, "total_sequences": 7,
    }


def take(inputs: dict[str, Any], sequences: range) -> dict[str, Any]:
    """The microbatch of some sequences, with the totals of the whole batch."""
    rows = torch.tensor([n for s in sequences for n in rows_of(inputs, s)], dtype=torch.int64)
    part = {**inputs, **{key: inputs[key].index_select(0, rows) for key in PER_TOKEN}}
    part["sequence_index"] = inputs["sequence_index"].index_select(0, rows) - sequences.start
    return {**part, "num_sequences": len(sequences)}


def tokens(**columns: list[float]) -> dict[str, Any]:
    """One sequence per token, f64. Missing columns: entropy and reference are 0, rollout is old_logprobs."""
    n = len(columns["logprobs"])
    given = {key: torch.tensor(value, dtype=torch.float64) for key, value in columns.items()}
    old = given.setdefault("old_logprobs", torch.zeros(n, dtype=torch.float64))
    return {"rollout_logprobs": old, "ref_logprobs": torch.zeros_like(old), "entropy": torch.zeros_like(old), **given,
            "sequence_index": torch.arange(n), "num_sequences": n, "total_loss_tokens": n, "total_sequences": n}
