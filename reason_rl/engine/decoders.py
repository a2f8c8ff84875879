"""One decode call of the engine, in its two forms: op by op through the model, or all of it in one native call.

`OpDecoder` is the readable one: the model's forward on the newest token of each sequence, with attention over the paged cache, then
`sample`. It runs everywhere. `NativeDecoder` draws several tokens a call (kernels/decode) where the native kernels are.
Both give a sequence the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from kernels.attention import BLOCK_SIZE, plan_pages
from kernels.native import DTYPES
from kernels.sample import check_tokens, sample
from reason_rl.engine.cache import DecodeAttend, KVCache
from reason_rl.engine.graphs import StepGraphs
from reason_rl.engine.native_decode import (
    DecodeBatch,
    DecodeModel,
    LayerWeights,
    cpu_unsupported_reason,
    decode,
    pack_layer,
    pack_weight,
)
from reason_rl.engine.scheduler import Prompt, Sequence, num_blocks_for
from reason_rl.model.transformer import MLP, Block, RouteTape, Transformer
from reason_rl.records import SamplingParams


class Drawn(NamedTuple):
    """What a call drew, a list for each sequence."""

    tokens: list[list[int]]
    logprobs: list[list[float]]
    kept_logmass: list[list[float]]
    routes: list[list[torch.Tensor]]
    """i32[n, L, k] of the n tokens that were computed, where routes are kept; else no tensor."""


def one_each(tokens: torch.Tensor, logprobs: torch.Tensor, kept_logmass: torch.Tensor, routes: torch.Tensor | None = None) -> Drawn:
    """[R] each, routes i32[R, L, k] -> one token for each of R sequences."""
    drawn, logprob, kept_mass = ([[value] for value in column.tolist()] for column in (tokens, logprobs, kept_logmass))
    check_tokens([token for [token] in drawn])
    kept: list[list[torch.Tensor]] = [[]] * len(tokens)
    if routes is not None:  # copied: a graph writes them again
        kept = [[row[None]] for row in routes.to("cpu", copy=True).unbind(0)]
    return Drawn(drawn, logprob, kept_mass, kept)


class Decoder(Protocol):
    cache: KVCache
    horizon: int
    """Most tokens that one call draws for a sequence."""

    def decode(self, running: SequenceOf[Sequence], limits: SequenceOf[int], sampling: SamplingParams) -> Drawn: ...


NATIVE_ONLY: dict[str, tuple[object, ...]] = {
    "attention_bias": ("none",), "qk_norm": ("none", "head"), "num_dense_layers": (0,), "routed_scaling_factor": (1.0,),
    "partial_rotary_factor": (1.0,)}
"""The values of the model's switches that csrc/decode knows; the scaled angles of RoPE come in its table."""


def native_why_not(model: Transformer) -> str:
    """Empty where `NativeDecoder` can decode this model, else the reason."""
    if model.gemm != "auto":
        return "projections by torch's own GEMMs were asked for"
    if model.compute_dtype not in DTYPES:
        return f"not for {model.compute_dtype}"
    if model.config.head_dim > 256:
        return f"not for a head dim of {model.config.head_dim}: above 256"
    for key, covered in NATIVE_ONLY.items():
        value = getattr(model.config, key)
        if value not in covered:
            return f"not for {key} = {value!r}"
    return cpu_unsupported_reason(model.embedding.weight.device)


def picks_native(model: Transformer, decoder: str) -> bool:
    """What `engine.decoder` comes to for this model."""
    reason = native_why_not(model) if decoder != "ops" else "ops were asked for"
    if decoder == "native" and reason:
        raise ValueError(f"engine.decoder='native' cannot decode this model: {reason}")
    return not reason


def layout(running: SequenceOf[Sequence]) -> dict[str, np.ndarray]:
    """Where the keys of the running sequences stand: i64 arrays, prompts numbered in order of their first sequence."""
    prompts: dict[Prompt, int] = {}
    index = [prompts.setdefault(s.prompt, len(prompts)) for s in running]
    return {
        "prefix_table": block_table([p.blocks for p in prompts]),
        "prefix_lens": np.array([p.length for p in prompts], dtype=np.int64),
        "prefix_index": np.array(index, dtype=np.int64), "own_table": block_table([s.blocks for s in running]),
        "own_lens": np.array([len(s.token_ids) for s in running], dtype=np.int64)}


def block_table(blocks: SequenceOf[list[int]]) -> np.ndarray:
    """Lists of blocks -> i64[rows, longest], padded with block 0."""
    table = np.zeros((len(blocks), max(map(len, blocks))), dtype=np.int64)
    for row, held in enumerate(blocks):
        table[row, : len(held)] = held
    return table


class OpDecoder:
    """One token a call, op by op; by a CUDA graph where `graphs` takes the batch."""

    horizon = 1

    def __init__(self, model: Transformer, cache: KVCache, with_routes: bool, graphs: StepGraphs | None = None) -> None:
        self.model, self.cache, self.with_routes, self.graphs = model, cache, with_routes, graphs

    def decode(self, running: SequenceOf[Sequence], limits: SequenceOf[int], sampling: SamplingParams) -> Drawn:
        device = self.cache.keys.device
        arrays = layout(running) | {
            "newest": np.array([s.token_ids[-1] for s in running], dtype=np.int64),
            "noise_keys": np.array([s.key for s in running], dtype=np.int64)}
        if self.graphs is not None and len(running) <= self.graphs.most:
            key = (self.with_routes, sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
            step = partial(self._step, sampling=sampling)
            return one_each(*self.graphs.run(step, key, arrays, num_blocks_for(sampling.max_tokens), device))
        tensors = {name: torch.from_numpy(array).to(device, non_blocking=True) for name, array in arrays.items()}
        return one_each(*self._step(tensors, sampling))

    def _step(self, inputs: Mapping[str, torch.Tensor], sampling: SamplingParams) -> tuple[torch.Tensor, ...]:
        """-> tokens, logprobs, kept_logmass [R], and routes i32[R, L, k] where they are kept. Nothing here waits for a GPU."""
        tables = {name: inputs[name] for name in ("prefix_table", "prefix_lens", "prefix_index", "own_table", "own_lens")}
        own = inputs["own_lens"]
        pages = plan_pages(**tables, num_kv_heads=self.cache.keys.shape[1], num_blocks=self.cache.keys.shape[2])
        block = inputs["own_table"].gather(1, (own - 1)[:, None] // BLOCK_SIZE)[:, 0]
        attend = DecodeAttend(self.cache, block * BLOCK_SIZE + (own - 1) % BLOCK_SIZE, pages)
        positions = inputs["prefix_lens"].index_select(0, inputs["prefix_index"]) + own - 1
        tape = RouteTape() if self.with_routes else None
        hidden = self.model(inputs["newest"], positions, attend, tape=tape).hidden
        drawn = sample(hidden, self.model.head_weight, inputs["noise_keys"], own, temperature=sampling.temperature,
                       top_k=sampling.top_k, top_p=sampling.top_p, min_p=sampling.min_p)
        return drawn if tape is None else (*drawn, tape.routes())


class NativeDecoder:
    """Up to `horizon` tokens a call; the weights are packed when it is made, so one serves one set of weights."""

    horizon = BLOCK_SIZE

    def __init__(self, model: Transformer, cache: KVCache, with_routes: bool) -> None:
        self.cache, self.packed, self.with_routes = cache, pack_model(model), with_routes

    def decode(self, running: SequenceOf[Sequence], limits: SequenceOf[int], sampling: SamplingParams) -> Drawn:
        batch = DecodeBatch(
            newest=torch.tensor([s.token_ids[-1] for s in running]), limits=torch.tensor(limits, dtype=torch.int64),
            noise_keys=torch.tensor([s.key for s in running]),
            **{name: torch.from_numpy(array) for name, array in layout(running).items()})
        tokens, logprobs, kept, routes, num_new = decode(
            self.packed, batch, self.cache.keys, self.cache.values, stop_ids=sampling.stop_ids, temperature=sampling.temperature,
            top_k=sampling.top_k, top_p=sampling.top_p, min_p=sampling.min_p, with_routes=self.with_routes)
        counts = num_new.tolist()
        drawn, logprob, mass = (
            [row[:n] for row, n in zip(column.tolist(), counts, strict=True)] for column in (tokens, logprobs, kept))
        return Drawn(drawn, logprob, mass, [[] if routes is None else [routes[row, :n].clone()] for row, n in enumerate(counts)])


def pack_model(model: Transformer) -> DecodeModel:
    """The model's weights as `decode` wants them; a copy in the compute dtype, made anew for every rollout."""
    config, weights = model.config, []
    for block in model.blocks:
        assert isinstance(block, Block)
        weights += pack_layer(_layer_weights(block), model.compute_dtype)
    weights += [model.embedding.weight.detach().float(), model.norm.weight.detach(),
                pack_weight(model.head_weight, model.compute_dtype), model.rope]
    is_dense = config.num_experts == 1
    sizes = (
        config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.num_experts,
        1 if is_dense else config.num_experts_per_tok, config.moe_intermediate_size,
        0 if is_dense else config.num_shared_experts * config.moe_intermediate_size, model.vocab_size, config.max_position_embeddings,
        int(config.router_score == "sigmoid"), int(config.norm_topk_prob))
    return DecodeModel(weights, sizes, config.rms_norm_eps, model.compute_dtype)


def _layer_weights(block: Block) -> LayerWeights:
    attention, mlp = block.attention, block.mlp
    common: dict[str, Any] = {
        "attention_norm": block.attention_norm.weight, "qkv": attention.qkv.weight, "out": attention.out.weight,
        "q_norm": None if attention.q_norm is None else attention.q_norm.weight,
        "k_norm": None if attention.k_norm is None else attention.k_norm.weight, "mlp_norm": block.mlp_norm.weight}
    if isinstance(mlp, MLP):
        return LayerWeights(**common, gate_up=mlp.gate_up.weight[None], down=mlp.down.weight[None])
    shared: dict[str, Any] = {}
    if mlp.shared is not None:
        shared = {"shared_gate_up": mlp.shared.gate_up.weight, "shared_down": mlp.shared.down.weight}
    return LayerWeights(
        **common, **shared, router=mlp.router, gate_up=mlp.gate_up, down=mlp.down,
        expert_bias=mlp.expert_bias if mlp.config.expert_bias else None)
