"""The engine's two decoders: op by op through the model, or the whole model in one native call.

`OpDecoder` is the readable one: the model's forward on the newest token of each sequence, with attention over
the paged cache, then `sample`. It runs on every device. `NativeDecoder` draws several tokens a call, on a CPU
with the native kernels. Both give a sequence the same bits.

Letters: R running sequences, P prompts, M layers with experts, k experts per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
import torch

from kernels.attention import BLOCK_SIZE, plan_pages
from kernels.sample import check_tokens, sample
from reason_rl.engine.cache import DecodeAttention, KVCache
from reason_rl.engine.graphs import StepGraphs
from reason_rl.engine.native_decode import DecodeBatch, decode, pack_model, unsupported_reason
from reason_rl.engine.scheduler import Prompt, Sequence, num_blocks_for
from reason_rl.model.transformer import RoutedExperts, Transformer
from reason_rl.records import ConfigError, SamplingParams


class Drawn(NamedTuple):
    """The tokens that one call drew: one list for each sequence."""

    tokens: list[list[int]]
    logprobs: list[list[float]]
    kept_logmass: list[list[float]]
    routed_expert_ids: list[list[torch.Tensor]]
    """One i32[n, M, k] for the n tokens that were computed, if recorded; else an empty list."""


def one_each(
    tokens: torch.Tensor, logprobs: torch.Tensor, kept_logmass: torch.Tensor, routed_expert_ids: torch.Tensor | None = None
) -> Drawn:
    """[R] each, routed_expert_ids i32[R, M, k] -> one token for each of R sequences."""
    drawn, logprob, kept = ([[value] for value in column.tolist()] for column in (tokens, logprobs, kept_logmass))
    check_tokens([token for [token] in drawn])
    expert_ids: list[list[torch.Tensor]] = [[]] * len(tokens)
    if routed_expert_ids is not None:  # copied: a CUDA graph overwrites its outputs
        expert_ids = [[ids[None]] for ids in routed_expert_ids.to("cpu", copy=True).unbind(0)]
    return Drawn(drawn, logprob, kept, expert_ids)


class Decoder(Protocol):
    cache: KVCache
    horizon: int
    """Most tokens that one call draws for a sequence."""

    def decode(self, running: SequenceOf[Sequence], limits: SequenceOf[int], sampling: SamplingParams) -> Drawn: ...


def picks_native(model: Transformer, decoder: str) -> bool:
    """Whether `engine.decoder` selects the native decoder; ValueError if it must and cannot."""
    reason = unsupported_reason(model) if decoder != "ops" else "engine.decoder='ops'"
    if decoder == "native" and reason:
        raise ConfigError(f"engine.decoder='native' cannot decode this model: {reason}")
    return not reason


def block_tables(running: SequenceOf[Sequence]) -> dict[str, np.ndarray]:
    """The block tables of the running sequences, as i64 arrays; names and shapes as in DecodeBatch."""
    prompts: dict[Prompt, int] = {}  # numbered in order of their first sequence
    index = [prompts.setdefault(s.prompt, len(prompts)) for s in running]
    return {
        "prefix_table": block_table([p.blocks for p in prompts]),
        "prefix_lens": np.array([p.length for p in prompts], dtype=np.int64),
        "prefix_index": np.array(index, dtype=np.int64), "own_table": block_table([s.blocks for s in running]),
        "own_lens": np.array([len(s.token_ids) for s in running], dtype=np.int64)}


def block_table(blocks: SequenceOf[list[int]]) -> np.ndarray:
    """Lists of blocks -> i64[lists, longest], padded with the null block."""
    table = np.zeros((len(blocks), max(map(len, blocks))), dtype=np.int64)
    for index, held in enumerate(blocks):
        table[index, : len(held)] = held
    return table


class OpDecoder:
    """One token a call, op by op; replayed as a CUDA graph if the batch fits `graphs`."""

    horizon = 1

    def __init__(
        self, model: Transformer, cache: KVCache, with_routed_experts: bool, graphs: StepGraphs | None = None
    ) -> None:
        self.model, self.cache, self.with_routed_experts, self.graphs = model, cache, with_routed_experts, graphs

    def decode(self, running: SequenceOf[Sequence], limits: SequenceOf[int], sampling: SamplingParams) -> Drawn:
        device = self.cache.keys.device
        arrays = block_tables(running) | {
            "newest": np.array([s.token_ids[-1] for s in running], dtype=np.int64),
            "noise_keys": np.array([s.noise_key for s in running], dtype=np.int64)}
        if self.graphs is not None and len(running) <= self.graphs.most:
            key = (self.with_routed_experts, sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
            step = partial(self._step, sampling=sampling)
            return one_each(*self.graphs.run(step, key, arrays, num_blocks_for(sampling.max_tokens), device))
        tensors = {name: torch.from_numpy(array).to(device, non_blocking=True) for name, array in arrays.items()}
        return one_each(*self._step(tensors, sampling))

    def _step(self, inputs: Mapping[str, torch.Tensor], sampling: SamplingParams) -> tuple[torch.Tensor, ...]:
        """-> tokens, logprobs, kept_logmass [R], and routed_expert_ids i32[R, M, k] if recorded. No op here
        may wait for the GPU: the step may be captured as a graph."""
        # Slot and position of each sequence's newest token.
        tables = {name: inputs[name] for name in ("prefix_table", "prefix_lens", "prefix_index", "own_table", "own_lens")}
        own = inputs["own_lens"]
        pages = plan_pages(**tables, num_kv_heads=self.cache.keys.shape[1], num_blocks=self.cache.keys.shape[2])
        block = inputs["own_table"].gather(1, (own - 1)[:, None] // BLOCK_SIZE)[:, 0]  # [R]
        slots = block * BLOCK_SIZE + (own - 1) % BLOCK_SIZE
        positions = inputs["prefix_lens"].index_select(0, inputs["prefix_index"]) + own - 1

        # Forward and sample.
        recorder = RoutedExperts() if self.with_routed_experts else None
        hidden = self.model(
            inputs["newest"], positions, DecodeAttention(self.cache, slots, pages), routed_experts=recorder).hidden  # [R, D]
        drawn = sample(hidden, self.model.head_weight, inputs["noise_keys"], own, temperature=sampling.temperature,
                       top_k=sampling.top_k, top_p=sampling.top_p, min_p=sampling.min_p)
        return drawn if recorder is None else (*drawn, recorder.expert_ids())


class NativeDecoder:
    """Up to `horizon` tokens a call, with the weights that the model has when the decoder is made."""

    horizon = BLOCK_SIZE

    def __init__(self, model: Transformer, cache: KVCache, with_routed_experts: bool) -> None:
        self.cache, self.packed, self.with_routed_experts = cache, pack_model(model), with_routed_experts

    def decode(self, running: SequenceOf[Sequence], limits: SequenceOf[int], sampling: SamplingParams) -> Drawn:
        batch = DecodeBatch(
            newest=torch.tensor([s.token_ids[-1] for s in running]), limits=torch.tensor(limits, dtype=torch.int64),
            noise_keys=torch.tensor([s.noise_key for s in running]),
            **{name: torch.from_numpy(array) for name, array in block_tables(running).items()})
        tokens, logprobs, kept_logmass, routed_expert_ids, num_new = decode(
            self.packed, batch, self.cache.keys, self.cache.values, stop_ids=sampling.stop_ids,
            temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p, min_p=sampling.min_p,
            with_routed_experts=self.with_routed_experts)

        # Keep the valid entries of each sequence.
        counts = num_new.tolist()
        drawn, logprob, kept = (
            [values[:n] for values, n in zip(column.tolist(), counts, strict=True)]
            for column in (tokens, logprobs, kept_logmass))
        expert_ids: list[list[torch.Tensor]] = [[]] * len(counts)
        if routed_expert_ids is not None:
            expert_ids = [[routed_expert_ids[r, :n].clone()] for r, n in enumerate(counts)]
        return Drawn(drawn, logprob, kept, expert_ids)
