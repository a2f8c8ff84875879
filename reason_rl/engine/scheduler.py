"""Which sequences run: continuous batching with admission by free blocks and preemption by recompute.

A sequence waits, runs, and ends; when no block is free for the next token of a running one, the youngest running
sequence gives its blocks back and waits again with its tokens kept; its keys are computed anew when it returns.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import torch

from kernels.attention import BLOCK_SIZE
from reason_rl.engine.blocks import BlockPool
from reason_rl.records import Problem


def num_blocks_for(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK_SIZE)


@dataclass(eq=False)
class Prompt:
    """A group's prompt: its blocks live while at least one of its sequences runs."""

    problem: Problem
    blocks: list[int] = field(default_factory=list)
    num_running: int = 0
    is_cached: bool = False
    """Its keys are in its blocks, and `first_hidden` holds the last row."""
    first_hidden: torch.Tensor | None = None
    """The hidden state of the prompt's last token, from which every first token of the group is sampled."""
    routes: torch.Tensor | None = None
    """i32[P, L, k], where asked for."""

    @property
    def length(self) -> int:
        return len(self.problem.prompt_ids)


@dataclass(eq=False)
class Sequence:
    prompt: Prompt
    sample_index: int
    key: int
    """Noise key of (run_seed, step, problem_id, sample_index)."""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    kept_logmass: list[float] = field(default_factory=list)
    routes: list[torch.Tensor] = field(default_factory=list)
    """i32[n, L, k] of each decode call, where asked for: the experts of the n tokens it computed."""
    blocks: list[int] = field(default_factory=list)

    @property
    def num_cached(self) -> int:
        """Own tokens whose keys the cache holds after the next decode: all but the one to be sampled."""
        return len(self.token_ids)


class Scheduler:
    def __init__(self, pool: BlockPool, max_num_seqs: int) -> None:
        self.pool = pool
        self.max_num_seqs = max_num_seqs
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        """In order of admission: the last is the youngest."""
        self.num_preemptions = 0

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def admit(self) -> list[Sequence]:
        """Move waiting sequences, in order, to running while their blocks are to be had; returns the newly running."""
        admitted = []
        while self.waiting and len(self.running) < self.max_num_seqs:
            sequence = self.waiting[0]
            prompt = sequence.prompt
            own = num_blocks_for(max(sequence.num_cached, 1))
            shared = 0 if prompt.num_running else num_blocks_for(prompt.length)
            # One block in hand for each running sequence that may need its next soon keeps preemption rare, not impossible.
            reserve = len(self.running) // 4 if self.running else 0
            if own + shared + reserve > self.pool.num_free:
                break
            self.waiting.popleft()
            if shared:
                prompt.blocks = self.pool.take(shared)
            elif prompt.num_running:
                self.pool.share(prompt.blocks)
            prompt.num_running += 1
            sequence.blocks = self.pool.take(own)
            self.running.append(sequence)
            admitted.append(sequence)
        return admitted

    def grow(self) -> None:
        """Give every running sequence room for the key of its newest token, preempting the youngest where blocks run out."""
        for sequence in list(self.running):
            if num_blocks_for(sequence.num_cached) <= len(sequence.blocks) or sequence not in self.running:
                continue  # has room, or was preempted while making room for an older one
            while num_blocks_for(sequence.num_cached) > len(sequence.blocks):
                if self.pool.num_free:
                    sequence.blocks += self.pool.take(1)
                    continue
                victim = self.running[-1]
                self._preempt(victim)
                if victim is sequence:
                    break

    def room(self, sequence: Sequence) -> int:
        """Tokens that can be decoded before the sequence needs another block: after `grow`, at least 1."""
        return len(sequence.blocks) * BLOCK_SIZE - sequence.num_cached + 1

    def reserve_ahead(self, horizon: int, most_blocks: int) -> None:
        """Where blocks are plenty, one more for each sequence without room for `horizon` tokens, to be decoded in one call."""
        for sequence in self.running:
            if self.pool.num_free <= len(self.running):
                return
            if self.room(sequence) < horizon and len(sequence.blocks) < most_blocks:
                sequence.blocks += self.pool.take(1)

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1

    def finish(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        prompt = sequence.prompt
        self.pool.release(sequence.blocks)
        self.pool.release(prompt.blocks)
        sequence.blocks = []
        prompt.num_running -= 1
        if not prompt.num_running:
            prompt.blocks, prompt.is_cached, prompt.first_hidden = [], False, None
