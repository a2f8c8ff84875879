"""Packing: groups or documents become `Microbatch`es, each group's prompt standing once before its completions.

Greedy and in order, under a token budget: no token is padded, no sequence is split, and a group that spans two microbatches
has its prompt in both. Every microbatch's loss is divided by one global denominator, so the split does not change it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch

from reason_rl.records import Group, Microbatch


@dataclass(frozen=True)
class Sample:
    """One completion as the update sees it."""

    group: Group
    group_id: int
    index: int
    """Its place in the group."""
    advantage: float


def select_samples(groups: Sequence[Group], advantages: torch.Tensor, mask: torch.Tensor) -> list[Sample]:
    """advantages f32[B, G], mask bool[B, G] -> the completions that take part, in order."""
    return [
        Sample(group, b, i, float(advantages[b, i]))
        for b, group in enumerate(groups)
        for i in range(len(group.completions))
        if mask[b, i]
    ]


def split_updates(samples: Sequence[Sample], num_updates: int) -> list[list[Sample]]:
    """The step's samples, in order, as `num_updates` parts of nearly equal size (whole completions)."""
    bounds = [len(samples) * part // num_updates for part in range(num_updates + 1)]
    return [list(samples[a:b]) for a, b in pairwise(bounds)]


def pack_samples(samples: Sequence[Sample], max_tokens: int) -> list[Microbatch]:
    """Samples of one group stand next to each other; each microbatch holds at most max_tokens, or one oversized sample."""
    packs: list[list[Sample]] = []
    used, last_group = 0, -1
    for sample in samples:
        prompt, own = len(sample.group.problem.prompt_ids), len(sample.group.completions[sample.index].token_ids)
        cost = own + (prompt if sample.group_id != last_group else 0)
        if not packs or used + cost > max_tokens:
            packs.append([])
            used, cost = 0, own + prompt
        packs[-1].append(sample)
        used, last_group = used + cost, sample.group_id
    return [_pack(pack) for pack in packs]


@dataclass
class _Pack:
    """A microbatch in the making: segments of tokens, and which row predicts which target of which sequence."""

    token_ids: list[int] = field(default_factory=list)
    position_ids: list[int] = field(default_factory=list)
    segments: list[tuple[int, int, int, int]] = field(default_factory=list)
    logits_index: list[int] = field(default_factory=list)
    target_ids: list[int] = field(default_factory=list)
    sequence_index: list[int] = field(default_factory=list)

    def add_segment(self, token_ids: Sequence[int], first_position: int = 0, prefix: tuple[int, int] = (0, 0)) -> int:
        """Lay tokens down behind `prefix` = (start, length) -> the row of the first; no tokens, no segment."""
        start = len(self.token_ids)
        if token_ids:
            self.segments.append((start, len(token_ids), *prefix))
            self.token_ids += token_ids
            self.position_ids += range(first_position, first_position + len(token_ids))
        return start

    def add_targets(self, sequence: int, predictors: Sequence[int], target_ids: Sequence[int]) -> None:
        self.logits_index += predictors
        self.target_ids += target_ids
        self.sequence_index += [sequence] * len(target_ids)

    def finish(self, num_sequences: int, routes: torch.Tensor | None = None, **floats: list[float]) -> Microbatch:
        return Microbatch(
            token_ids=torch.tensor(self.token_ids, dtype=torch.int64),
            position_ids=torch.tensor(self.position_ids, dtype=torch.int32),
            segments=torch.tensor(self.segments, dtype=torch.int32).view(-1, 4),
            logits_index=torch.tensor(self.logits_index, dtype=torch.int64),
            target_ids=torch.tensor(self.target_ids, dtype=torch.int64),
            sequence_index=torch.tensor(self.sequence_index, dtype=torch.int32),
            num_sequences=num_sequences,
            routes=routes,
            **{name: torch.tensor(values, dtype=torch.float32) for name, values in floats.items()},
        )


def _pack(samples: Sequence[Sample]) -> Microbatch:
    pack = _Pack()
    advantages: list[float] = []
    rollout_logprobs: list[float] = []
    kept_logmass: list[float] = []
    routes: list[torch.Tensor] = []
    prompt_start, last_group = 0, -1
    for sequence, sample in enumerate(samples):
        prompt = sample.group.problem.prompt_ids
        completion = sample.group.completions[sample.index]
        own = completion.token_ids
        if sample.group_id != last_group:
            prompt_start, last_group = pack.add_segment(prompt), sample.group_id
            routes += [] if sample.group.prompt_routes is None else [sample.group.prompt_routes]
        # A completion's last token predicts nothing, so it has no row; the engine never computes it either.
        start = pack.add_segment(own[:-1], len(prompt), (prompt_start, len(prompt)))
        pack.add_targets(sequence, [prompt_start + len(prompt) - 1, *range(start, start + len(own) - 1)], own)
        advantages += [sample.advantage] * len(own)
        rollout_logprobs += completion.logprobs
        kept_logmass += completion.kept_logmass
        routes += [] if completion.routes is None else [completion.routes]
    return pack.finish(len(samples), torch.cat(routes) if routes else None, advantages=advantages,
                       rollout_logprobs=rollout_logprobs, kept_logmass=kept_logmass)


def pack_documents(documents: Sequence[tuple[Sequence[int], int]], max_tokens: int) -> list[Microbatch]:
    """Supervised packs: (token_ids, num_prompt_tokens) pairs; the loss is on what follows the prompt, from the second token on.

    A base model's corpus has num_prompt_tokens = 0, fine-tuning the length of the prompt.
    """
    packs: list[list[tuple[Sequence[int], int]]] = []
    used = 0
    for ids, num_prompt in documents:
        if len(ids) < 2 or num_prompt >= len(ids):
            raise ValueError(f"a document needs a token to predict: got {len(ids)} tokens, {num_prompt} of them prompt")
        if not packs or used + len(ids) > max_tokens:
            packs.append([])
            used = 0
        packs[-1].append((ids, num_prompt))
        used += len(ids)
    return [_pack_documents(pack) for pack in packs]


def _pack_documents(documents: Sequence[tuple[Sequence[int], int]]) -> Microbatch:
    pack = _Pack()
    for sequence, (ids, num_prompt) in enumerate(documents):
        first = max(num_prompt, 1)
        start = pack.add_segment(ids[:-1])
        pack.add_targets(sequence, range(start + first - 1, start + len(ids) - 1), ids[first:])
    return pack.finish(len(documents))


def idle_microbatch(like: Microbatch) -> Microbatch:
    """One token and no loss, for a rank that ran out of microbatches while others still hold collectives to join."""
    empty_i64, empty_f32 = torch.zeros(0, dtype=torch.int64), torch.zeros(0)
    is_rl = like.advantages is not None
    return Microbatch(
        token_ids=like.token_ids[:1].clone(), position_ids=torch.zeros(1, dtype=torch.int32),
        segments=torch.tensor([[0, 1, 0, 0]], dtype=torch.int32), logits_index=empty_i64, target_ids=empty_i64,
        sequence_index=torch.zeros(0, dtype=torch.int32), num_sequences=0,
        advantages=empty_f32 if is_rl else None, rollout_logprobs=empty_f32 if is_rl else None,
        kept_logmass=empty_f32 if is_rl else None, routes=None if like.routes is None else like.routes[:1].clone(),
    )
