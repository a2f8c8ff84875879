"""Scores packed tokens with a model: hidden states at the loss tokens, and their logprobs.

The trainer's update, the reference policy and the reward model share this forward. Left out: packing
(reason_rl/rl) and the policy-gradient loss, which `linear_grpo_loss` folds into the LM head
(reason_rl/trainer).
"""

from __future__ import annotations

import torch

from kernels.attention import attention, plan_segments
from kernels.linear_logprob import linear_logprob
from reason_rl.model.transformer import RoutedExperts, RouterStats, Transformer, gemm_impl
from reason_rl.records import Microbatch


def packed_hidden(
    model: Transformer, microbatch: Microbatch, with_stats: bool = False
) -> tuple[torch.Tensor, RouterStats | None]:
    """-> (hidden states [N, D] at `logits_index`, in the compute dtype; router statistics if `with_stats`).

    The microbatch must be on the model's device. Its routed_expert_ids, where given, are replayed.
    """
    plan = plan_segments(microbatch.segments, microbatch.num_tokens, microbatch.token_ids.device)
    replayed = microbatch.routed_expert_ids
    output = model(
        microbatch.token_ids, microbatch.position_ids, lambda layer, q, k, v: attention(q, k, v, plan),
        with_stats=with_stats, routed_experts=None if replayed is None else RoutedExperts(replayed))
    return output.hidden.index_select(0, microbatch.logits_index), output.router  # [T, D] -> [N, D]


def token_logprobs(
    model: Transformer, microbatch: Microbatch, temperature: float = 1.0, with_stats: bool = False
) -> tuple[torch.Tensor, torch.Tensor, RouterStats | None]:
    """-> (logprob f32[N] of each target in nats, entropy f32[N], router statistics if `with_stats`)."""
    hidden, router = packed_hidden(model, microbatch, with_stats)
    logprob, entropy = linear_logprob(
        hidden, model.head_weight, microbatch.target_ids, temperature, impl=gemm_impl(model.batch_invariant))
    return logprob, entropy, router
