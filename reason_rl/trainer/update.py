"""One optimizer update from microbatches: supervised (pretraining, SFT) or policy gradient (GRPO and its
family).

Both run the same forward and compute the same logprobs (`linear_grpo_loss` is `linear_logprob` with the loss
in the same op). A loss is a sum over tokens in which a token's weight depends on counts over all microbatches
and ranks, so but for rounding it does not depend on how the batch was split.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from kernels.grpo_loss import LossInputs, LossSpec, finish_metrics, merge_metrics
from kernels.linear_grpo_loss import linear_grpo_loss
from reason_rl.model.scoring import packed_hidden, token_logprobs
from reason_rl.model.transformer import Transformer, gemm_impl
from reason_rl.parallel.fsdp import rank_share
from reason_rl.parallel.world import World
from reason_rl.records import Microbatch
from reason_rl.rl.packing import idle_microbatch
from reason_rl.trainer.policy import Policy

OnLoss = Callable[[Microbatch, LossInputs, torch.Tensor, float], None]
"""(microbatch, inputs, logprobs f32[N], loss), called after each microbatch's forward and backward, before the optimizer step."""


@torch.no_grad()
def fill_logprobs(
    model: Transformer, microbatches: Sequence[Microbatch], world: World, *, temperature: float, name: str
) -> list[Microbatch]:
    """The microbatches with field `name` (old_logprobs or ref_logprobs) computed by `model`. Each rank fills
    only the microbatches that it trains on. Routing replay does not apply to the reference policy."""
    def seen(m: Microbatch) -> Microbatch:
        return (replace(m, routed_expert_ids=None) if name == "ref_logprobs" else m).to(world.device)

    return [
        replace(m, **{name: token_logprobs(model, seen(m), temperature)[0]})  # type: ignore[arg-type]
        if number % world.size == world.rank else m
        for number, m in enumerate(microbatches)
    ]


def supervised_update(
    policy: Policy, microbatches: Sequence[Microbatch], *, lr_factor: float, balance_coef: float = 0.0,
    z_loss_coef: float = 0.0, expert_bias_rate: float = 0.0,
) -> dict[str, float]:
    """Cross-entropy on every target, plus the router losses -> loss, grad_norm, balance, num_loss_tokens."""
    # Denominators over all microbatches and ranks.
    model, world = policy.model, policy.world
    total = sum(m.num_loss_tokens for m in microbatches)
    total_rows = sum(m.num_tokens for m in microbatches)
    loss_sum = balance_sum = 0.0
    counts: torch.Tensor | None = None

    # Forward and backward of this rank's microbatches.
    for local in rank_share(microbatches, world, idle_microbatch(microbatches[0])):
        microbatch = local.to(world.device)
        logprob, _, router = token_logprobs(model, microbatch, with_stats=True)
        loss = -logprob.sum() / total
        loss_sum += float(loss.detach())
        if router is not None and local.num_loss_tokens:
            balance = router.balance_loss / total_rows
            balance_sum += float(balance.detach())
            counts = router.expert_counts if counts is None else counts + router.expert_counts
            loss = loss + balance_coef * balance
            if z_loss_coef:
                loss = loss + z_loss_coef * router.z_loss / total_rows
        (loss * world.size).backward()  # FSDP averages gradients over ranks; these losses must be added
    grad_norm = policy.optimizer.step(lr_factor)
    gathered = world.gather((loss_sum, balance_sum, None if counts is None else counts.cpu()))
    loads = [c for _, _, c in gathered if c is not None]
    if expert_bias_rate and loads:
        model.nudge_expert_bias(torch.stack(loads).sum(0).to(world.device), expert_bias_rate)
    policy.updated()
    return {"loss": sum(g[0] for g in gathered), "balance": sum(g[1] for g in gathered),
            "grad_norm": grad_norm, "num_loss_tokens": float(total)}


def loss_inputs(microbatch: Microbatch, total_loss_tokens: int, total_sequences: int) -> LossInputs:
    """A microbatch's tensors for the loss. Without old_logprobs, rollout_logprobs take their place."""
    rollout, kept, advantages = microbatch.rollout_logprobs, microbatch.kept_logmass, microbatch.advantages
    assert rollout is not None and kept is not None and advantages is not None, "policy_update needs rollouts, not documents"
    return LossInputs(
        old_logprobs=rollout if microbatch.old_logprobs is None else microbatch.old_logprobs, advantages=advantages,
        sequence_index=microbatch.sequence_index, num_sequences=microbatch.num_sequences,
        total_loss_tokens=total_loss_tokens, total_sequences=total_sequences,
        rollout_logprobs=rollout - kept, ref_logprobs=microbatch.ref_logprobs)


def policy_update(
    policy: Policy, microbatches: Sequence[Microbatch], spec: LossSpec, temperature: float, *, lr_factor: float,
    max_gap: float = math.inf, on_loss: OnLoss | None = None,
) -> dict[str, float]:
    """One policy-gradient update -> the loss's metrics. `microbatches` are those of all ranks.

    If a microbatch has no old_logprobs, the logprobs that the engine recorded are used. With top-k, top-p or
    min-p the policy that sampled is a truncated one; loss.importance corrects for the difference between it and
    old_logprobs.

    `max_abs_logprob_gap` compares the trainer's logprobs with the engine's. On policy (a step's first update) it
    measures how exactly they agree. If it is above `max_gap`, this raises and no optimizer step is made.
    """
    # The loss's denominators: counts over all microbatches and ranks.
    model, world = policy.model, policy.world
    total_tokens = sum(m.num_loss_tokens for m in microbatches)
    total_sequences = sum(m.num_sequences for m in microbatches)
    parts: list[dict[str, torch.Tensor]] = []
    loss_sum, gaps = 0.0, [0.0]

    # Forward and backward of this rank's microbatches. A rank with fewer of them runs idle ones, because FSDP's
    # collectives need every rank.
    idle = replace(idle_microbatch(microbatches[0]), ref_logprobs=torch.zeros(0) if spec.kl_coef > 0 else None)
    for local in rank_share(microbatches, world, idle):
        microbatch = local.to(world.device)
        hidden, _ = packed_hidden(model, microbatch)
        inputs = loss_inputs(microbatch, total_tokens, total_sequences)
        loss, metrics, logprob = linear_grpo_loss(
            hidden, model.head_weight, microbatch.target_ids, inputs, spec, temperature, impl=gemm_impl(model.batch_invariant))
        (loss * world.size).backward()  # FSDP averages gradients over ranks; these losses must be added
        loss_sum += float(loss.detach())
        if on_loss is not None:
            on_loss(microbatch, inputs, logprob, float(loss.detach()))
        if local.num_loss_tokens:
            assert microbatch.rollout_logprobs is not None
            gaps.append(float((logprob - microbatch.rollout_logprobs).abs().max()))
            parts.append({key: value.cpu() for key, value in metrics.items()})

    # Check the gap, then clip and step.
    gathered = world.gather((loss_sum, gaps, parts))
    gap = float(torch.tensor([value for g in gathered for value in g[1]]).max())  # max() propagates NaN
    _check_gap(gap, max_gap)

    # Optimizer step and metrics.
    grad_norm = policy.optimizer.step(lr_factor)
    policy.updated()
    merged = finish_metrics(merge_metrics([part for _, _, rank_parts in gathered for part in rank_parts]))
    merged.pop("logprob_gap_max", None)  # it compares with the truncated policy; max_abs_logprob_gap with the full softmax
    return merged | {"loss": sum(g[0] for g in gathered), "max_abs_logprob_gap": gap,
                     "grad_norm": grad_norm, "num_loss_tokens": float(total_tokens)}


def _check_gap(gap: float, max_gap: float) -> None:
    if math.isinf(max_gap) or gap <= max_gap:
        return
    if max_gap == 0:
        raise FloatingPointError(
            f"logprobs of engine and trainer differ by {gap:.3g} nats on policy, but run.exact='on' requires 0: "
            "the result of some op depends on the batch (`python -m kernels` lists the implementations). "
            "run.exact='auto' only logs the gap")
    raise FloatingPointError(
        f"logprobs of engine and trainer differ by {gap:.3g} nats on policy, more than rl.max_logprob_gap = {max_gap}. "
        "rl.max_logprob_gap=0 does not stop at a gap; rl.old_logprobs='recompute' with loss.importance='tis' corrects for it")
