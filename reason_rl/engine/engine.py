"""The rollout engine: `generate(problems, group_size, sampling, ...)` -> one `Group` a problem.

The loop: admit sequences while blocks are free; prefill the new prompts, once a group; then decode all running sequences one
token at a time, each token recorded with its logprob. It calls the trainer's own model with the trainer's own ops, so its
logprobs are the ones the trainer will compute.

Left out: speculative decoding, prefix caching across prompts, several sampling settings in one call.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf

import numpy as np
import torch

from kernels.attention import BLOCK_SIZE, plan_pages, plan_segments
from kernels.sample import sample
from reason_rl.config import EngineConfig
from reason_rl.engine.blocks import BlockPool
from reason_rl.engine.cache import DecodeAttend, KVCache, PrefillAttend
from reason_rl.engine.scheduler import Prompt, Scheduler, Sequence, num_blocks_for
from reason_rl.model.transformer import Transformer
from reason_rl.types import Completion, Group, Problem, SamplingParams

OnToken = Callable[[Problem, int, int], None]
"""(problem, sample_index, token_id), called as each token is sampled."""


def noise_key(run_seed: int, step: int, problem_id: int, sample_index: int) -> int:
    """63 bits that key all the noise of one completion; the token's position is the counter (kernels/sample/philox.py)."""
    text = f"{run_seed}/{step}/{problem_id}/{sample_index}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def check_fits(problems: SequenceOf[Problem], max_tokens: int, max_positions: int, num_blocks: int) -> None:
    """Raises when a prompt is empty, or leaves no room for max_tokens in the context or in a cache of num_blocks (0: any)."""
    longest = max(len(p.prompt_ids) for p in problems)
    if min(len(p.prompt_ids) for p in problems) == 0:
        raise ValueError("a prompt must hold at least one token, got an empty one")
    if longest + max_tokens > max_positions:
        raise ValueError(f"a prompt of {longest} tokens and sampling.max_tokens = {max_tokens} "
                         f"do not fit model.max_positions = {max_positions}")
    needed = 1 + num_blocks_for(longest) + num_blocks_for(max_tokens)
    if num_blocks and needed > num_blocks:
        raise ValueError(f"a prompt of {longest} tokens with sampling.max_tokens = {max_tokens} needs {needed} KV "
                         f"blocks of {BLOCK_SIZE}, but engine.num_blocks = {num_blocks}")


class Engine:
    """Holds the KV cache; the weights are whatever `model` holds when `generate` is called."""

    def __init__(self, model: Transformer, config: EngineConfig, run_seed: int) -> None:
        self.model, self.config, self.run_seed = model, config, run_seed
        self.device = model.embedding.weight.device
        self.num_preemptions = 0
        self._cache: KVCache | None = None

    @torch.no_grad()
    def generate(
        self, problems: SequenceOf[Problem], group_size: int, sampling: SamplingParams, *,
        step: int, policy_version: int = 0, on_token: OnToken | None = None,
    ) -> list[Group]:
        """`group_size` completions of each problem, in the problems' order. `step` is part of the noise key."""
        if not problems:
            return []
        scheduler = Scheduler(self._pool(problems, group_size, sampling), self.config.max_num_seqs)
        sequences = [
            Sequence(prompt, index, noise_key(self.run_seed, step, prompt.problem.problem_id, index))
            for prompt in map(Prompt, problems)
            for index in range(group_size)
        ]
        for sequence in sequences:
            scheduler.add(sequence)
        while scheduler.has_work:
            admitted = scheduler.admit()
            assert scheduler.running, "nothing runs and nothing can be admitted: _pool must size the pool for one sequence"
            self._prefill(admitted)
            fresh = [s for s in admitted if not s.token_ids]
            if fresh:
                hidden = torch.stack([s.prompt.first_hidden for s in fresh if s.prompt.first_hidden is not None])
                self._sample(scheduler, fresh, hidden, sampling, on_token)
            scheduler.grow()
            if scheduler.running:
                self._sample(scheduler, scheduler.running[:], self._decode(scheduler.running), sampling, on_token)
        self.num_preemptions += scheduler.num_preemptions
        return _to_groups(problems, group_size, sequences, policy_version)

    def _pool(self, problems: SequenceOf[Problem], group_size: int, sampling: SamplingParams) -> BlockPool:
        """Makes the cache large enough for the longest sequence at least."""
        check_fits(problems, sampling.max_tokens, self.model.config.max_positions, self.config.num_blocks)
        longest = max(len(p.prompt_ids) for p in problems)
        num_seqs = min(self.config.max_num_seqs, len(problems) * group_size)
        # Enough for all that may run at once, plus what `Scheduler.admit` keeps in hand.
        own, shared = num_seqs * num_blocks_for(sampling.max_tokens), min(num_seqs, len(problems)) * num_blocks_for(longest)
        ample = 1 + own + shared + num_seqs // 4
        num_blocks = self.config.num_blocks or ample
        if self._cache is None or self._cache.keys.shape[2] < num_blocks or self._cache.keys.dtype != self.model.compute_dtype:
            self._cache = KVCache(self.model.config, num_blocks, self.model.compute_dtype, self.device)
        return BlockPool(num_blocks)

    def _prefill(self, admitted: list[Sequence]) -> None:
        """Compute the keys of new prompts, and of the tokens that preempted sequences had; in passes of bounded size."""
        pending: dict[Prompt, list[Sequence]] = {}
        for sequence in admitted:
            if not sequence.prompt.is_cached or len(sequence.token_ids) > 1:
                pending.setdefault(sequence.prompt, []).append(sequence)
        batch: list[tuple[Prompt, list[Sequence]]] = []
        used = 0
        for prompt, sequences in pending.items():
            returning = [s for s in sequences if len(s.token_ids) > 1]
            cost = prompt.length + sum(len(s.token_ids) - 1 for s in returning)
            if batch and used + cost > self.config.prefill_tokens:
                self._prefill_pass(batch)
                batch, used = [], 0
            batch.append((prompt, returning))
            used += cost
        if batch:
            self._prefill_pass(batch)

    def _prefill_pass(self, batch: list[tuple[Prompt, list[Sequence]]]) -> None:
        """One pack: each prompt, then its returning sequences' tokens but the newest (that one is decoded next)."""
        assert self._cache is not None
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        segments: list[tuple[int, int, int, int]] = []
        last_rows: list[int] = []
        for prompt, returning in batch:
            start = len(token_ids)
            segments.append((start, prompt.length, 0, 0))
            token_ids += prompt.problem.prompt_ids
            positions += range(prompt.length)
            slots += [prompt.blocks[i // BLOCK_SIZE] * BLOCK_SIZE + i % BLOCK_SIZE for i in range(prompt.length)]
            last_rows.append(len(token_ids) - 1)
            for sequence in returning:
                own = sequence.token_ids[:-1]
                segments.append((len(token_ids), len(own), start, prompt.length))
                token_ids += own
                positions += range(prompt.length, prompt.length + len(own))
                slots += [sequence.blocks[i // BLOCK_SIZE] * BLOCK_SIZE + i % BLOCK_SIZE for i in range(len(own))]
        plan = plan_segments(torch.tensor(segments, dtype=torch.int32), len(token_ids), self.device)
        attend = PrefillAttend(self._cache, plan, self._tensor(slots))
        hidden = self.model(self._tensor(token_ids), self._tensor(positions), attend).hidden
        for (prompt, _), row in zip(batch, last_rows, strict=True):
            prompt.first_hidden, prompt.is_cached = hidden[row].clone(), True

    def _decode(self, running: list[Sequence]) -> torch.Tensor:
        """One token for every running sequence -> hidden [R, D]."""
        assert self._cache is not None
        newest = np.array([s.token_ids[-1] for s in running])
        own = np.array([len(s.token_ids) for s in running])
        prompts = list(dict.fromkeys(s.prompt for s in running))
        number = {prompt: i for i, prompt in enumerate(prompts)}
        prefix_index = np.array([number[s.prompt] for s in running])
        prefix_lens = np.array([prompt.length for prompt in prompts])
        last_block = np.array([s.blocks[(len(s.token_ids) - 1) // BLOCK_SIZE] for s in running])
        pages = plan_pages(
            prefix_table=self._tensor(_table([p.blocks for p in prompts])), prefix_lens=self._tensor(prefix_lens),
            prefix_index=self._tensor(prefix_index), own_table=self._tensor(_table([s.blocks for s in running])),
            own_lens=self._tensor(own), num_kv_heads=self._cache.keys.shape[1], num_blocks=self._cache.keys.shape[2])
        attend = DecodeAttend(self._cache, self._tensor(last_block * BLOCK_SIZE + (own - 1) % BLOCK_SIZE), pages)
        positions = prefix_lens[prefix_index] + own - 1
        hidden: torch.Tensor = self.model(self._tensor(newest), self._tensor(positions), attend).hidden
        return hidden

    def _sample(
        self, scheduler: Scheduler, sequences: list[Sequence], hidden: torch.Tensor, sampling: SamplingParams,
        on_token: OnToken | None,
    ) -> None:
        """Draw each sequence's next token, record it, and end the sequences that are done."""
        keys = self._tensor([s.key for s in sequences])
        positions = self._tensor([len(s.token_ids) for s in sequences])
        drawn = sample(
            hidden, self.model.head_weight, keys, positions, temperature=sampling.temperature,
            top_k=sampling.top_k, top_p=sampling.top_p, min_p=sampling.min_p)
        tokens, logprobs, kept = (column.tolist() for column in drawn)
        for sequence, token, logprob, mass in zip(sequences, tokens, logprobs, kept, strict=True):
            sequence.token_ids.append(token)
            sequence.logprobs.append(logprob)
            sequence.kept_logmass.append(mass)
            if on_token is not None:
                on_token(sequence.prompt.problem, sequence.sample_index, token)
            if token in sampling.stop_ids:
                scheduler.finish(sequence, "stop")
            elif len(sequence.token_ids) == sampling.max_tokens:
                scheduler.finish(sequence, "length")

    def _tensor(self, values: list[int] | np.ndarray) -> torch.Tensor:
        return torch.as_tensor(np.asarray(values, dtype=np.int64)).to(self.device, non_blocking=True)


def _table(blocks: list[list[int]]) -> np.ndarray:
    """Lists of blocks -> i64[rows, longest], padded with block 0."""
    table = np.zeros((len(blocks), max(map(len, blocks))), dtype=np.int64)
    for row, held in enumerate(blocks):
        table[row, : len(held)] = held
    return table


def _to_groups(
    problems: SequenceOf[Problem], group_size: int, sequences: list[Sequence], policy_version: int
) -> list[Group]:
    def completion(sequence: Sequence) -> Completion:
        assert sequence.finish_reason is not None
        return Completion(
            tuple(sequence.token_ids), tuple(sequence.logprobs), tuple(sequence.kept_logmass),
            sequence.finish_reason, policy_version, sequence.sample_index)

    return [
        Group(problem, tuple(map(completion, sequences[row * group_size : (row + 1) * group_size])))
        for row, problem in enumerate(problems)
    ]
