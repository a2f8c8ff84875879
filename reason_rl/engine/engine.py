"""The rollout engine: `generate(problems, group_size, sampling, ...)` -> one `Group` a problem.

The loop: admit sequences while blocks are free; prefill the new prompts, once a group; then decode all running sequences, a token
or several at a time, each recorded with its logprob. It calls the trainer's own model with the trainer's own ops, so its
logprobs are the ones the trainer will compute.

Left out: speculative decoding, prefix caching across prompts, several sampling settings in one call.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

import numpy as np
import torch

from kernels.attention import BLOCK_SIZE, plan_segments
from kernels.sample import sample
from reason_rl.config import EngineConfig
from reason_rl.engine.blocks import BlockPool
from reason_rl.engine.cache import KVCache, PrefillAttend, bytes_per_block
from reason_rl.engine.decoders import Decoder, Drawn, NativeDecoder, OpDecoder, one_each, picks_native
from reason_rl.engine.graphs import StepGraphs
from reason_rl.engine.scheduler import Prompt, Scheduler, Sequence, num_blocks_for
from reason_rl.model.transformer import RouteTape, Transformer
from reason_rl.records import Completion, FinishReason, Group, Problem, SamplingParams

WAITING_HORIZON = 4
"""Most tokens drawn in one call while sequences wait for the place of one that ends."""
GIB = 1 << 30
OnToken = Callable[[Problem, int, int], None]
"""(problem, sample_index, token_id), called as each token is sampled."""
OnFinish = Callable[[Problem, Completion], None]
"""(problem, completion), called as each completion ends, while others are still sampled."""


def noise_key(run_seed: int, step: int, problem_id: int, sample_index: int) -> int:
    """63 bits that key all the noise of one completion; the token's position is the counter (kernels/sample/philox.py)."""
    text = f"{run_seed}/{step}/{problem_id}/{sample_index}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def num_blocks_needed(prompt_length: int, max_tokens: int) -> int:
    """By a pool that one sequence can run in: block 0 is nobody's."""
    return 1 + num_blocks_for(prompt_length) + num_blocks_for(max_tokens)


def check_fits(problems: SequenceOf[Problem], max_tokens: int, max_position_embeddings: int, num_blocks: int) -> None:
    """Raises when a prompt is empty, or leaves no room for max_tokens in the context or in a cache of num_blocks (0: any)."""
    longest = max(len(p.prompt_ids) for p in problems)
    if min(len(p.prompt_ids) for p in problems) == 0:
        raise ValueError("a prompt must hold at least one token, got an empty one")
    if longest + max_tokens > max_position_embeddings:
        raise ValueError(f"a prompt of {longest} tokens and sampling.max_tokens = {max_tokens} "
                         f"do not fit model.max_position_embeddings = {max_position_embeddings}")
    needed = num_blocks_needed(longest, max_tokens)
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
        self.graphs = StepGraphs(config.cuda_graph_batch) if config.cuda_graph_batch and self.device.type == "cuda" else None

    @torch.no_grad()
    def generate(
        self, problems: SequenceOf[Problem], group_size: int, sampling: SamplingParams, *,
        step: int, policy_version: int = 0, on_token: OnToken | None = None, on_finish: OnFinish | None = None,
        with_routes: bool = False,
    ) -> list[Group]:
        """`group_size` completions of each problem, in the problems' order. `step` is part of the noise key. `with_routes` keeps
        the experts of every token, for routing replay. With `on_token`, tokens are drawn one at a time, to be shown at once."""
        if not problems:
            return []
        scheduler = Scheduler(self._pool(problems, group_size, sampling), self.config.max_num_seqs)
        rollout = _Rollout(scheduler, sampling, policy_version, on_token, on_finish)
        decoder = self._decoder(with_routes)
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
            self._prefill(admitted, with_routes)
            fresh = [s for s in admitted if not s.token_ids]
            if fresh:
                rollout.record(fresh, self._first_tokens(fresh, sampling))
            scheduler.grow()
            if scheduler.running:
                rollout.decode(decoder)
        self.num_preemptions += scheduler.num_preemptions
        done = [rollout.completions[sequence] for sequence in sequences]
        return [
            Group(problem, tuple(done[row * group_size : (row + 1) * group_size]),
                  prompt_routes=sequences[row * group_size].prompt.routes)
            for row, problem in enumerate(problems)
        ]

    def _pool(self, problems: SequenceOf[Problem], group_size: int, sampling: SamplingParams) -> BlockPool:
        """Makes the cache large enough for the longest sequence at least."""
        check_fits(problems, sampling.max_tokens, self.model.config.max_position_embeddings, self.config.num_blocks)
        num_blocks = self.config.num_blocks or self._num_blocks(problems, group_size, sampling.max_tokens)
        dtype, is_native = self.model.compute_dtype, picks_native(self.model, self.config.decoder)
        cache = self._cache
        if cache is None or cache.keys.shape[2] < num_blocks or cache.keys.dtype != dtype or cache.is_native != is_native:
            cache = self._cache = None  # before the new one is made, so that there are never two
            if self.graphs is not None:
                self.graphs.forget()
            self._cache = KVCache(self.model.config, num_blocks, dtype, self.device, is_native)
        return BlockPool(num_blocks)

    def _num_blocks(self, problems: SequenceOf[Problem], group_size: int, max_tokens: int) -> int:
        """Enough for all that may run at once, plus what `Scheduler.admit` keeps in hand; less where engine.cache_gib is less."""
        longest = max(len(p.prompt_ids) for p in problems)
        num_seqs = min(self.config.max_num_seqs, len(problems) * group_size)
        own, shared = num_seqs * num_blocks_for(max_tokens), min(num_seqs, len(problems)) * num_blocks_for(longest)
        ample = 1 + own + shared + num_seqs // 4
        fitting = int(self.config.cache_gib * GIB) // bytes_per_block(self.model.config, self.model.compute_dtype)
        return min(ample, max(fitting, num_blocks_needed(longest, max_tokens)))

    def _decoder(self, with_routes: bool) -> Decoder:
        """Made anew for every rollout: it may hold the weights in a layout of its own."""
        assert self._cache is not None
        if self._cache.is_native:
            return NativeDecoder(self.model, self._cache, with_routes)
        return OpDecoder(self.model, self._cache, with_routes, self.graphs)

    def _prefill(self, admitted: list[Sequence], with_routes: bool) -> None:
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
                self._prefill_pass(batch, with_routes)
                batch, used = [], 0
            batch.append((prompt, returning))
            used += cost
        if batch:
            self._prefill_pass(batch, with_routes)

    def _prefill_pass(self, batch: list[tuple[Prompt, list[Sequence]]], with_routes: bool) -> None:
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
        tape = RouteTape() if with_routes else None
        hidden = self.model(self._tensor(token_ids), self._tensor(positions), attend, tape=tape).hidden
        routes = tape.routes().cpu() if tape is not None else None
        for (prompt, _), row in zip(batch, last_rows, strict=True):
            prompt.first_hidden, prompt.is_cached = hidden[row].clone(), True
            prompt.routes = None if routes is None else routes[row + 1 - prompt.length : row + 1].clone()

    def _first_tokens(self, fresh: list[Sequence], sampling: SamplingParams) -> Drawn:
        """The first token of each new sequence, from the last hidden state of its prompt."""
        hidden = torch.stack([s.prompt.first_hidden for s in fresh if s.prompt.first_hidden is not None])
        return one_each(*sample(
            hidden, self.model.head_weight, self._tensor([s.key for s in fresh]), self._tensor([0] * len(fresh)),
            temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p, min_p=sampling.min_p))

    def _tensor(self, values: list[int] | np.ndarray) -> torch.Tensor:
        return torch.as_tensor(np.asarray(values, dtype=np.int64)).to(self.device, non_blocking=True)


@dataclass(frozen=True)
class _Rollout:
    """What one `generate` was asked for, and the completions that have ended."""

    scheduler: Scheduler
    sampling: SamplingParams
    policy_version: int
    on_token: OnToken | None
    on_finish: OnFinish | None
    completions: dict[Sequence, Completion] = field(default_factory=dict)

    def decode(self, decoder: Decoder) -> None:
        """More tokens for every running sequence: one, or as many as the decoder draws in a call and all have room for."""
        scheduler, most = self.scheduler, self.sampling.max_tokens
        running = scheduler.running[:]
        horizon = min(decoder.horizon, WAITING_HORIZON) if scheduler.waiting else decoder.horizon
        if self.on_token is not None:
            horizon = 1
        if horizon > 1:
            scheduler.reserve_ahead(horizon, num_blocks_for(most))
        limits = [min(horizon, scheduler.room(s), most - len(s.token_ids)) for s in running]
        self.record(running, decoder.decode(running, limits, self.sampling))

    def record(self, sequences: list[Sequence], drawn: Drawn) -> None:
        """Add what was drawn to each sequence, and end the sequences that are done."""
        for sequence, tokens, logprobs, kept, routes in zip(sequences, *drawn, strict=True):
            sequence.token_ids += tokens
            sequence.logprobs += logprobs
            sequence.kept_logmass += kept
            sequence.routes += routes
            if self.on_token is not None:
                for token in tokens:
                    self.on_token(sequence.prompt.problem, sequence.sample_index, token)
            if tokens[-1] in self.sampling.stop_ids:
                self._finish(sequence, "stop")
            elif len(sequence.token_ids) == self.sampling.max_tokens:
                self._finish(sequence, "length")

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        self.scheduler.finish(sequence)
        completion = self.completions[sequence] = Completion(
            tuple(sequence.token_ids), tuple(sequence.logprobs), tuple(sequence.kept_logmass), reason, self.policy_version,
            sequence.sample_index, torch.cat(sequence.routes) if sequence.routes else None)
        if self.on_finish is not None:
            self.on_finish(sequence.prompt.problem, completion)
