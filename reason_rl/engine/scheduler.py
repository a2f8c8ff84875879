"""Continuous batching: which sequences run, with admission by free blocks and preemption by recompute.

A sequence waits, runs, and finishes. If no block is free for the next token of a running sequence, the
youngest running sequence is preempted: it frees its blocks and waits again. It keeps its tokens; a prefill
recomputes their keys when it returns.
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
    """The prompt of a group. Its blocks are allocated while at least one of its sequences runs."""

    problem: Problem
    blocks: list[int] = field(default_factory=list)
    num_running: int = 0
    is_cached: bool = False
    """Its keys are in its blocks, and `last_hidden` is set."""
    last_hidden: torch.Tensor | None = None
    """[D]: the hidden state of the last token; the first token of every completion is sampled from it."""
    routed_expert_ids: torch.Tensor | None = None
    """i32[P, M, k], if recorded."""

    @property
    def length(self) -> int:
        return len(self.problem.prompt_ids)


@dataclass(eq=False)
class Sequence:
    """One completion being sampled."""

    prompt: Prompt
    sample_index: int
    noise_key: int
    """The sampler's key, of (run_seed, step, problem_id, sample_index)."""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    kept_logmass: list[float] = field(default_factory=list)
    routed_expert_ids: list[torch.Tensor] = field(default_factory=list)
    """i32[n, M, k] of each decode call, if recorded, for the n tokens that it computed."""
    blocks: list[int] = field(default_factory=list)
    """The blocks of its completion's tokens; the prompt's are in `prompt.blocks`."""

    @property
    def num_cached(self) -> int:
        """Own tokens with keys in the cache after the next decode step: all sampled so far."""
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
        """Admits waiting sequences in FIFO order while enough blocks are free -> the newly running."""
        admitted = []
        while self.waiting and len(self.running) < self.max_num_seqs:
            sequence = self.waiting[0]
            prompt = sequence.prompt

            # Blocks it needs: its own, its prompt's unless a running sequence shares them, and a reserve for
            # the running sequences' next tokens, which makes preemption rare.
            num_own = num_blocks_for(max(sequence.num_cached, 1))
            num_prompt = 0 if prompt.num_running else num_blocks_for(prompt.length)
            reserve = len(self.running) // 4
            if num_own + num_prompt + reserve > self.pool.num_free:
                break

            self.waiting.popleft()
            if prompt.num_running:
                self.pool.fork(prompt.blocks)
            else:
                prompt.blocks = self.pool.allocate(num_prompt)
            prompt.num_running += 1
            sequence.blocks = self.pool.allocate(num_own)
            self.running.append(sequence)
            admitted.append(sequence)
        return admitted

    def grow(self) -> None:
        """Allocates a block to every running sequence that needs one for its newest token's key; preempts the
        youngest sequences if none is free."""
        for sequence in list(self.running):
            if num_blocks_for(sequence.num_cached) <= len(sequence.blocks) or sequence not in self.running:
                continue  # has room, or was preempted for an older sequence
            while num_blocks_for(sequence.num_cached) > len(sequence.blocks):
                if self.pool.num_free:
                    sequence.blocks += self.pool.allocate(1)
                    continue
                victim = self.running[-1]
                self._preempt(victim)
                if victim is sequence:
                    break

    def room(self, sequence: Sequence) -> int:
        """Tokens that can be decoded before the sequence needs another block: at least 1 after `grow`."""
        return len(sequence.blocks) * BLOCK_SIZE - sequence.num_cached + 1

    def reserve_ahead(self, horizon: int, most_blocks: int) -> None:
        """While many blocks are free: one more for each sequence without room for `horizon` tokens."""
        for sequence in self.running:
            if self.pool.num_free <= len(self.running):
                return
            if self.room(sequence) < horizon and len(sequence.blocks) < most_blocks:
                sequence.blocks += self.pool.allocate(1)

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._free_blocks(sequence)
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1

    def finish(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._free_blocks(sequence)

    def _free_blocks(self, sequence: Sequence) -> None:
        prompt = sequence.prompt
        self.pool.free(sequence.blocks)
        self.pool.free(prompt.blocks)
        sequence.blocks = []
        prompt.num_running -= 1
        if not prompt.num_running:
            prompt.blocks, prompt.is_cached, prompt.last_hidden = [], False, None
