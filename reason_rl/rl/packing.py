"""Packs groups (RL) or documents (supervised) into `Microbatch`es, a group's prompt once for its completions.

Greedy and in order, within a token budget: no padding, no sequence is split, and a group that spans two
microbatches has its prompt in both. The loss of every microbatch is divided by the same global count, so it
does not depend on the split.

Letters: B prompts, G group size, T packed tokens, N loss tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch

from reason_rl.records import Completion, Group, Microbatch
from reason_rl.rl.advantages import Advantages


@dataclass(frozen=True)
class Sample:
    """One completion that takes part in the update."""

    group: Group
    group_id: int
    """0..B-1: the group's index in the step."""
    index: int
    """0..G-1: the completion's index in the group."""

    @property
    def completion(self) -> Completion:
        return self.group.completions[self.index]


def pack(
    groups: Sequence[Group], advantages: Advantages, num_minibatches: int, microbatch_tokens: int
) -> list[list[Microbatch]]:
    """A step's groups -> one list of microbatches per optimizer update; an update without samples is left out.

    The microbatches are on the CPU, except their advantages, which stay on the device that computed them.
    """
    minibatches = split_minibatches(select_samples(groups, advantages.mask), num_minibatches)
    return [pack_samples(samples, advantages.advantages, microbatch_tokens) for samples in minibatches if samples]


def select_samples(groups: Sequence[Group], mask: torch.Tensor) -> list[Sample]:
    """mask bool[B, G] -> the completions that take part and have a sampled token, in order."""
    return [
        Sample(group, b, i)
        for (b, group), takes_part in zip(enumerate(groups), mask.tolist(), strict=True)
        for i, completion in enumerate(group.completions)
        if takes_part[i] and _sampled_tokens(completion)
    ]


def split_minibatches(samples: Sequence[Sample], num_minibatches: int) -> list[list[Sample]]:
    """The samples, in order, in `num_minibatches` lists whose lengths differ by at most 1."""
    bounds = [len(samples) * i // num_minibatches for i in range(num_minibatches + 1)]
    return [list(samples[start:stop]) for start, stop in pairwise(bounds)]


def pack_samples(samples: Sequence[Sample], advantages: torch.Tensor, max_tokens: int) -> list[Microbatch]:
    """advantages f32[B, G] -> microbatches of at most max_tokens; a larger sample gets a microbatch alone.

    Samples of one group must be neighbours.
    """
    microbatches: list[list[Sample]] = []
    used, last_group = 0, -1
    for sample in samples:
        num_prompt, num_own = len(sample.group.problem.prompt_ids), len(sample.completion.token_ids)
        cost = num_own + (num_prompt if sample.group_id != last_group else 0)
        if not microbatches or used + cost > max_tokens:
            microbatches.append([])
            used, cost = 0, num_own + num_prompt
        microbatches[-1].append(sample)
        used, last_group = used + cost, sample.group_id
    return [_pack_completions(chosen, advantages) for chosen in microbatches]


def _sampled_tokens(completion: Completion) -> list[int]:
    """Indices of the tokens that the policy sampled: the targets of the loss. The others were inserted."""
    num_tokens, token_mask = len(completion.token_ids), completion.token_mask
    if token_mask is None:
        return list(range(num_tokens))
    if len(token_mask) != num_tokens:
        raise ValueError(f"token_mask must have one entry for each of {num_tokens} tokens, got {len(token_mask)}")
    return [t for t in range(num_tokens) if token_mask[t]]


@dataclass
class _Builder:
    """The lists of one microbatch; the fields are those of `Microbatch`."""

    token_ids: list[int] = field(default_factory=list)
    position_ids: list[int] = field(default_factory=list)
    segments: list[tuple[int, int, int, int]] = field(default_factory=list)
    logits_index: list[int] = field(default_factory=list)
    target_ids: list[int] = field(default_factory=list)
    sequence_index: list[int] = field(default_factory=list)

    def add_segment(self, token_ids: Sequence[int], prefix: tuple[int, int] = (0, 0)) -> int:
        """Appends tokens, if any, as a segment that continues `prefix` = (start, length) -> its start."""
        start = len(self.token_ids)
        if token_ids:
            first_position = prefix[1]
            self.segments.append((start, len(token_ids), *prefix))
            self.token_ids += token_ids
            self.position_ids += range(first_position, first_position + len(token_ids))
        return start

    def add_targets(self, sequence: int, logits_index: Sequence[int], target_ids: Sequence[int]) -> None:
        self.logits_index += logits_index
        self.target_ids += target_ids
        self.sequence_index += [sequence] * len(target_ids)

    def finish(self, num_sequences: int, **tensors: torch.Tensor | None) -> Microbatch:
        """The lists as tensors, and the optional fields as given."""
        return Microbatch(
            token_ids=torch.tensor(self.token_ids, dtype=torch.int64),
            position_ids=torch.tensor(self.position_ids, dtype=torch.int32),
            segments=torch.tensor(self.segments, dtype=torch.int32).view(-1, 4),
            logits_index=torch.tensor(self.logits_index, dtype=torch.int64),
            target_ids=torch.tensor(self.target_ids, dtype=torch.int64),
            sequence_index=torch.tensor(self.sequence_index, dtype=torch.int32),
            num_sequences=num_sequences, **tensors)


def _pack_completions(samples: Sequence[Sample], advantages: torch.Tensor) -> Microbatch:
    builder, group_size = _Builder(), advantages.shape[1]
    advantage_index: list[int] = []  # b * G + g of each loss token
    rollout_logprobs: list[float] = []
    kept_logmass: list[float] = []
    routed_expert_ids: list[torch.Tensor] = []
    prompt_start, last_group = 0, -1
    for sequence, sample in enumerate(samples):
        prompt, completion = sample.group.problem.prompt_ids, sample.completion

        # The prompt, once for all completions of the group.
        if sample.group_id != last_group:
            prompt_start, last_group = builder.add_segment(prompt), sample.group_id
            if sample.group.prompt_routed_expert_ids is not None:
                routed_expert_ids.append(sample.group.prompt_routed_expert_ids)

        # The completion without its last token, which predicts nothing; the engine did not compute it either.
        own = completion.token_ids
        start = builder.add_segment(own[:-1], (prompt_start, len(prompt)))
        if completion.routed_expert_ids is not None:
            routed_expert_ids.append(completion.routed_expert_ids)

        # Its sampled tokens are targets; each is predicted by the token before it.
        sampled = _sampled_tokens(completion)
        last_of_prompt = prompt_start + len(prompt) - 1
        logits_index = [start + t - 1 if t else last_of_prompt for t in sampled]
        builder.add_targets(sequence, logits_index, [own[t] for t in sampled])
        advantage_index += [sample.group_id * group_size + sample.index] * len(sampled)
        rollout_logprobs += [completion.logprobs[t] for t in sampled]
        kept_logmass += [completion.kept_logmass[t] for t in sampled]

    # Gathered on the device, so that the host does not wait for the advantages.
    index = torch.tensor(advantage_index, dtype=torch.int64).to(advantages.device, non_blocking=True)
    return builder.finish(
        len(samples), advantages=advantages.flatten().index_select(0, index),  # [B, G] -> [N]
        rollout_logprobs=torch.tensor(rollout_logprobs, dtype=torch.float32),
        kept_logmass=torch.tensor(kept_logmass, dtype=torch.float32),
        routed_expert_ids=torch.cat(routed_expert_ids) if routed_expert_ids else None)


def pack_documents(documents: Sequence[tuple[Sequence[int], int]], max_tokens: int) -> list[Microbatch]:
    """(token_ids, num_prompt_tokens) pairs -> supervised microbatches. The targets are the tokens after the
    prompt, from the second token on: num_prompt_tokens is 0 in pretraining, the prompt's length in
    fine-tuning."""
    microbatches: list[list[tuple[Sequence[int], int]]] = []
    used = 0
    for ids, num_prompt in documents:
        if len(ids) < 2 or num_prompt >= len(ids):
            raise ValueError(f"a document needs a token to predict: got {len(ids)} tokens, {num_prompt} of them prompt")
        if not microbatches or used + len(ids) > max_tokens:
            microbatches.append([])
            used = 0
        microbatches[-1].append((ids, num_prompt))
        used += len(ids)
    return [_pack_documents(chosen) for chosen in microbatches]


def _pack_documents(documents: Sequence[tuple[Sequence[int], int]]) -> Microbatch:
    builder = _Builder()
    for sequence, (ids, num_prompt) in enumerate(documents):
        first = max(num_prompt, 1)  # the first target
        start = builder.add_segment(ids[:-1])
        builder.add_targets(sequence, range(start + first - 1, start + len(ids) - 1), ids[first:])
    return builder.finish(len(documents))


def idle_microbatch(like: Microbatch) -> Microbatch:
    """One token and no targets, with the optional fields of `like`: for a rank that has no microbatch left
    while others still run collectives."""
    empty_i64, empty_f32 = torch.zeros(0, dtype=torch.int64), torch.zeros(0)
    is_rl = like.advantages is not None
    return Microbatch(
        token_ids=like.token_ids[:1].clone(), position_ids=torch.zeros(1, dtype=torch.int32),
        segments=torch.tensor([[0, 1, 0, 0]], dtype=torch.int32), logits_index=empty_i64, target_ids=empty_i64,
        sequence_index=torch.zeros(0, dtype=torch.int32), num_sequences=0,
        advantages=empty_f32 if is_rl else None, rollout_logprobs=empty_f32 if is_rl else None,
        kept_logmass=empty_f32 if is_rl else None,
        routed_expert_ids=None if like.routed_expert_ids is None else like.routed_expert_ids[:1].clone())
