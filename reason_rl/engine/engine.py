"""The rollout engine: `generate(problems, group_size, sampling, ...)` -> one `Group` for each problem.

The loop: admit sequences while blocks are free; prefill each new prompt once for its group; decode one or
more tokens for every running sequence; record tokens and logprobs. It runs the trainer's model on the
trainer's ops, or a native decode with the same bits, so its logprobs are the ones that the trainer computes.

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
from reason_rl.engine.cache import KVCache, PrefillAttention, bytes_per_block
from reason_rl.engine.decoders import Decoder, Drawn, NativeDecoder, OpDecoder, one_each, picks_native
from reason_rl.engine.graphs import StepGraphs
from reason_rl.engine.scheduler import Prompt, Scheduler, Sequence, num_blocks_for
from reason_rl.model.transformer import RoutedExperts, Transformer
from reason_rl.records import Completion, ConfigError, FinishReason, Group, Problem, SamplingParams

WAITING_HORIZON = 4
"""Most tokens drawn in one call while sequences wait: a finished sequence should make room soon."""
GIB = 1 << 30
OnToken = Callable[[Problem, int, int], None]
"""(problem, sample_index, token_id), called as each token is sampled."""
OnFinish = Callable[[Problem, Completion], None]
"""(problem, completion), called as each completion ends, while others are still being sampled."""
OnStep = Callable[[Scheduler], None]
"""Reads the scheduler's state, after each admission and before each decode call, which then draws one token."""


def noise_key(run_seed: int, step: int, problem_id: int, sample_index: int) -> int:
    """63 bits: the key of one completion's noise; its counter is the token's position (kernels/sample)."""
    text = f"{run_seed}/{step}/{problem_id}/{sample_index}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def num_blocks_needed(prompt_length: int, max_tokens: int) -> int:
    """The smallest pool that one sequence can run in, with the null block."""
    return 1 + num_blocks_for(prompt_length) + num_blocks_for(max_tokens)


def check_fits(problems: SequenceOf[Problem], max_tokens: int, max_position_embeddings: int, num_blocks: int) -> None:
    """ValueError if a prompt is empty, or does not fit the context or num_blocks (0: any) with max_tokens."""
    longest = max(len(p.prompt_ids) for p in problems)
    if min(len(p.prompt_ids) for p in problems) == 0:
        raise ConfigError("a prompt must hold at least one token, got an empty one")
    if longest + max_tokens > max_position_embeddings:
        raise ConfigError(f"a prompt of {longest} tokens and sampling.max_tokens = {max_tokens} "
                         f"do not fit model.max_position_embeddings = {max_position_embeddings}")
    needed = num_blocks_needed(longest, max_tokens)
    if num_blocks and needed > num_blocks:
        raise ConfigError(f"a prompt of {longest} tokens with sampling.max_tokens = {max_tokens} needs {needed} KV "
                         f"blocks of {BLOCK_SIZE}, but engine.num_blocks = {num_blocks}")


class Engine:
    """Owns the KV cache. `generate` samples with the weights that `model` has at the time of the call."""

    def __init__(self, model: Transformer, config: EngineConfig, run_seed: int) -> None:
        self.model, self.config, self.run_seed = model, config, run_seed
        self.device = model.embedding.weight.device
        self.num_preemptions = 0
        self.on_step: OnStep | None = None
        """An observer; it must not change what it is given."""
        self._cache: KVCache | None = None
        self.graphs = StepGraphs(config.cuda_graph_batch) if config.cuda_graph_batch and self.device.type == "cuda" else None

    @torch.no_grad()
    def generate(
        self, problems: SequenceOf[Problem], group_size: int, sampling: SamplingParams, *,
        step: int, policy_version: int = 0, on_token: OnToken | None = None, on_finish: OnFinish | None = None,
        with_routed_experts: bool = False,
    ) -> list[Group]:
        """`group_size` completions of each problem, in the problems' order. `step` is part of the noise key.

        `with_routed_experts` records the experts of every token, for routing replay. With `on_token`, each
        decode call draws one token, so that a stream shows it at once.
        """
        if not problems:
            return []
        scheduler = Scheduler(self._pool(problems, group_size, sampling), self.config.max_num_seqs)
        rollout = _Rollout(scheduler, sampling, policy_version, on_token, on_finish, self.on_step)
        decoder = self._decoder(with_routed_experts)
        sequences = [
            Sequence(prompt, index, noise_key(self.run_seed, step, prompt.problem.problem_id, index))
            for prompt in map(Prompt, problems)
            for index in range(group_size)
        ]
        for sequence in sequences:
            scheduler.add(sequence)

        while scheduler.has_work:
            # Prefill the admitted, and sample first tokens from their prompts.
            admitted = scheduler.admit()
            assert scheduler.running, "nothing runs and nothing can be admitted: the pool is smaller than one sequence"
            self._prefill(admitted, with_routed_experts)
            if admitted and self.on_step is not None:
                self.on_step(scheduler)
            new = [s for s in admitted if not s.token_ids]
            if new:
                rollout.record(new, self._first_tokens(new, sampling))

            # Decode all that run.
            scheduler.grow()
            if scheduler.running:
                rollout.decode(decoder)
        self.num_preemptions += scheduler.num_preemptions
        return [rollout.group(sequences[i : i + group_size]) for i in range(0, len(sequences), group_size)]

    def _pool(self, problems: SequenceOf[Problem], group_size: int, sampling: SamplingParams) -> BlockPool:
        """An empty pool, and a KV cache at least as large: the one of an earlier call if it fits."""
        check_fits(problems, sampling.max_tokens, self.model.config.max_position_embeddings, self.config.num_blocks)
        num_blocks = self.config.num_blocks or self._num_blocks(problems, group_size, sampling.max_tokens)
        dtype, is_native = self.model.compute_dtype, picks_native(self.model, self.config.decoder)
        cache = self._cache
        if cache is None or cache.keys.shape[2] < num_blocks or cache.keys.dtype != dtype or cache.is_native != is_native:
            cache = self._cache = None  # freed before the new one is allocated
            if self.graphs is not None:
                self.graphs.forget()
            self._cache = KVCache(self.model.config, num_blocks, dtype, self.device, is_native)
        return BlockPool(num_blocks)

    def _num_blocks(self, problems: SequenceOf[Problem], group_size: int, max_tokens: int) -> int:
        """Enough for all that may run at once and `Scheduler.admit`'s reserve; at most engine.cache_gib."""
        longest = max(len(p.prompt_ids) for p in problems)
        num_seqs = min(self.config.max_num_seqs, len(problems) * group_size)
        num_own = num_seqs * num_blocks_for(max_tokens)
        num_prompt = min(num_seqs, len(problems)) * num_blocks_for(longest)
        ample = 1 + num_own + num_prompt + num_seqs // 4
        affordable = int(self.config.cache_gib * GIB) // bytes_per_block(self.model.config, self.model.compute_dtype)
        return min(ample, max(affordable, num_blocks_needed(longest, max_tokens)))

    def _decoder(self, with_routed_experts: bool) -> Decoder:
        """One decoder per call of `generate`: the native one copies the weights."""
        assert self._cache is not None
        if self._cache.is_native:
            return NativeDecoder(self.model, self._cache, with_routed_experts)
        return OpDecoder(self.model, self._cache, with_routed_experts, self.graphs)

    def _prefill(self, admitted: list[Sequence], with_routed_experts: bool) -> None:
        """Computes the keys of new prompts and of returning sequences, in passes of prefill_tokens."""
        # Prompts with work to do, and their sequences.
        pending: dict[Prompt, list[Sequence]] = {}
        for sequence in admitted:
            if not sequence.prompt.is_cached or len(sequence.token_ids) > 1:
                pending.setdefault(sequence.prompt, []).append(sequence)

        # Greedy passes: a prompt and its returning sequences are never split.
        batch: list[tuple[Prompt, list[Sequence]]] = []
        used = 0
        for prompt, sequences in pending.items():
            returning = [s for s in sequences if len(s.token_ids) > 1]
            cost = prompt.length + sum(len(s.token_ids) - 1 for s in returning)
            if batch and used + cost > self.config.prefill_tokens:
                self._prefill_pass(batch, with_routed_experts)
                batch, used = [], 0
            batch.append((prompt, returning))
            used += cost
        if batch:
            self._prefill_pass(batch, with_routed_experts)

    def _prefill_pass(self, batch: list[tuple[Prompt, list[Sequence]]], with_routed_experts: bool) -> None:
        """One packed forward: each prompt, then its returning sequences' tokens except the newest, which is
        decoded next."""
        assert self._cache is not None
        pack = _PrefillPack()
        last_index: list[int] = []  # of each prompt's last token
        for prompt, returning in batch:
            start = len(pack.token_ids)
            pack.add(prompt.problem.prompt_ids, prompt.blocks)
            last_index.append(len(pack.token_ids) - 1)
            for sequence in returning:
                pack.add(sequence.token_ids[:-1], sequence.blocks, prefix=(start, prompt.length))

        plan = plan_segments(torch.tensor(pack.segments, dtype=torch.int32), len(pack.token_ids), self.device)
        attn_fn = PrefillAttention(self._cache, plan, self._tensor(pack.slots))
        recorder = RoutedExperts() if with_routed_experts else None
        hidden = self.model(
            self._tensor(pack.token_ids), self._tensor(pack.position_ids), attn_fn, routed_experts=recorder).hidden  # [T, D]

        expert_ids = None if recorder is None else recorder.expert_ids().cpu()  # i32[T, M, k]
        for (prompt, _), last in zip(batch, last_index, strict=True):
            prompt.last_hidden, prompt.is_cached = hidden[last].clone(), True
            if expert_ids is not None:
                prompt.routed_expert_ids = expert_ids[last + 1 - prompt.length : last + 1].clone()

    def _first_tokens(self, new: list[Sequence], sampling: SamplingParams) -> Drawn:
        """The first token of each new sequence, from the last hidden state of its prompt."""
        hidden = torch.stack([s.prompt.last_hidden for s in new if s.prompt.last_hidden is not None])  # [R, D]
        return one_each(*sample(
            hidden, self.model.head_weight, self._tensor([s.noise_key for s in new]), self._tensor([0] * len(new)),
            temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p, min_p=sampling.min_p))

    def _tensor(self, values: list[int] | np.ndarray) -> torch.Tensor:
        return torch.as_tensor(np.asarray(values, dtype=np.int64)).to(self.device, non_blocking=True)


@dataclass
class _PrefillPack:
    """Tokens packed for one prefill pass, with their positions and KV slots."""

    token_ids: list[int] = field(default_factory=list)
    position_ids: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    segments: list[tuple[int, int, int, int]] = field(default_factory=list)
    """(start, length, prefix_start, prefix_length)"""

    def add(self, token_ids: SequenceOf[int], blocks: list[int], prefix: tuple[int, int] = (0, 0)) -> None:
        """Appends one segment that attends to `prefix` = (start, length) and to itself."""
        first_position = prefix[1]
        self.segments.append((len(self.token_ids), len(token_ids), *prefix))
        self.token_ids += token_ids
        self.position_ids += range(first_position, first_position + len(token_ids))
        self.slots += [blocks[i // BLOCK_SIZE] * BLOCK_SIZE + i % BLOCK_SIZE for i in range(len(token_ids))]


@dataclass(frozen=True)
class _Rollout:
    """The arguments of one `generate`, and the completions that have ended."""

    scheduler: Scheduler
    sampling: SamplingParams
    policy_version: int
    on_token: OnToken | None
    on_finish: OnFinish | None
    on_step: OnStep | None
    completions: dict[Sequence, Completion] = field(default_factory=dict)

    def group(self, sequences: list[Sequence]) -> Group:
        """The group of one prompt's sequences, all finished."""
        prompt = sequences[0].prompt
        return Group(prompt.problem, tuple(self.completions[sequence] for sequence in sequences),
                     prompt_routed_expert_ids=prompt.routed_expert_ids)

    def decode(self, decoder: Decoder) -> None:
        """Draws tokens for every running sequence, up to the horizon, its room and max_tokens."""
        scheduler, most = self.scheduler, self.sampling.max_tokens
        running = scheduler.running[:]
        horizon = min(decoder.horizon, WAITING_HORIZON) if scheduler.waiting else decoder.horizon
        if self.on_token is not None or self.on_step is not None:
            horizon = 1
        if horizon > 1:
            scheduler.reserve_ahead(horizon, num_blocks_for(most))
        if self.on_step is not None:
            self.on_step(scheduler)
        limits = [min(horizon, scheduler.room(s), most - len(s.token_ids)) for s in running]
        self.record(running, decoder.decode(running, limits, self.sampling))

    def record(self, sequences: list[Sequence], drawn: Drawn) -> None:
        """Appends the drawn tokens, and finishes sequences that stopped or reached max_tokens."""
        for sequence, tokens, logprobs, kept_logmass, routed_expert_ids in zip(sequences, *drawn, strict=True):
            sequence.token_ids += tokens
            sequence.logprobs += logprobs
            sequence.kept_logmass += kept_logmass
            sequence.routed_expert_ids += routed_expert_ids
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
            sequence.sample_index, torch.cat(sequence.routed_expert_ids) if sequence.routed_expert_ids else None)
        if self.on_finish is not None:
            self.on_finish(sequence.prompt.problem, completion)
