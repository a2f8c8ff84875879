"""Native decode: several tokens for every running sequence, the whole model in one C++ call.

A decode step is many ops on small matrices; on a CPU the Python calls would take most of its time. Here each
thread takes its sequences through all layers and all steps. csrc/decode calls the C++ functions of the
trainer's ops in the model's order, so tokens and logprobs have the same bits as the op-by-op step.

This is not an op of `kernels`: it has no reference beyond reason_rl/model/transformer.py, which the op-by-op
decoder runs, and no other device. It supports the models of SUPPORTED and refuses all others.
Siblings: csrc/decode/, tests/reason_rl/engine/test_native_decode.py, test_engine_bits.py.

Letters: R running sequences, P prompts, M most tokens drawn in the call, D hidden size, H heads, K kv heads,
C head dim, E experts, I expert width, k experts per token, L layers, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from kernels.attention import BLOCK_SIZE
from kernels.checks import check
from kernels.native import DTYPES, OPS, cpu_unsupported_reason
from reason_rl.model.transformer import MLP, Block, Transformer

__all__ = ["DecodeBatch", "DecodeModel", "LayerWeights", "decode", "pack_layer", "pack_model", "pack_weight", "store_keys",
           "unsupported_reason"]

LANES = 16
"""Columns of a packed panel (csrc/common/gemm.h)."""
MAX_HEAD_DIM = 256

ANY = None
SUPPORTED: Mapping[str, tuple[object, ...] | None] = {
    # Names and sizes.
    "init_from": ANY, "family": ANY, "num_hidden_layers": ANY, "hidden_size": ANY, "num_attention_heads": ANY,
    "num_key_value_heads": ANY, "head_dim": ANY, "num_experts": ANY, "num_experts_per_tok": ANY,
    "moe_intermediate_size": ANY, "intermediate_size": ANY, "num_shared_experts": ANY, "max_position_embeddings": ANY,
    # Passed to csrc/decode as a value or a table.
    "norm_topk_prob": ANY, "expert_bias": ANY, "tie_word_embeddings": ANY, "rope_theta": ANY, "rope_scaling": ANY,
    "rms_norm_eps": ANY, "router_score": ("softmax", "sigmoid"),
    # Supported in part.
    "attention_bias": ("none",), "qk_norm": ("none", "head"), "num_dense_layers": (0,), "routed_scaling_factor": (1.0,),
    "partial_rotary_factor": (1.0,),
}
"""ModelConfig field -> the values that csrc/decode implements. A field that is not listed is refused."""


def unsupported_reason(model: Transformer) -> str:
    """Why the native decode cannot run this model; empty if it can."""
    if not model.batch_invariant:
        return "batch_invariant is off: projections by torch's own GEMMs"
    if model.compute_dtype not in DTYPES:
        return f"not for {model.compute_dtype}"
    if model.config.head_dim > MAX_HEAD_DIM:
        return f"not for a head dim of {model.config.head_dim}: above {MAX_HEAD_DIM}"
    for field in fields(model.config):
        value = getattr(model.config, field.name)
        supported = SUPPORTED.get(field.name, ())
        if supported is not ANY and value not in supported:
            return f"not for {field.name} = {value!r}"
    return cpu_unsupported_reason(model.embedding.weight.device)


# --- weights

@dataclass(frozen=True)
class LayerWeights:
    """The weights of one layer, f32 or in the compute dtype; None for what the model does not have."""

    attention_norm: torch.Tensor
    """f32[D]"""
    qkv_proj: torch.Tensor
    """[(H + 2K) * C, D]"""
    o_proj: torch.Tensor
    """[D, H * C]"""
    mlp_norm: torch.Tensor
    """f32[D]"""
    gate_up_proj: torch.Tensor
    """[E, 2I, D]; [1, 2I, D] in a dense layer."""
    down_proj: torch.Tensor
    """[E, D, I]"""
    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None
    router: torch.Tensor | None = None
    """f32[E, D]; None in a dense layer."""
    expert_bias: torch.Tensor | None = None
    """f32[E]"""
    shared_gate_up_proj: torch.Tensor | None = None
    shared_down_proj: torch.Tensor | None = None


@dataclass(frozen=True)
class DecodeModel:
    """A model in the memory layout of csrc/decode: a copy, so one serves one version of the weights."""

    weights: list[torch.Tensor]
    """`pack_layer` of each layer, then embedding f32[V, D], last norm, packed head, RoPE table."""
    sizes: tuple[int, ...]
    """D, H, K, C, E, k, I, width of the shared experts, V, positions, is sigmoid, norm_topk_prob."""
    eps: float
    dtype: torch.dtype


def pack_weight(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """weight: f32|dtype [N, K] or [E, N, K] -> dtype, flat, in panels of LANES output columns."""
    matrices = weight.detach() if weight.dim() == 3 else weight.detach()[None]  # [E, N, K]
    count, rows, columns = matrices.shape
    step = 1 if dtype == torch.float32 else 2
    packed = torch.empty(count * (-(-rows // LANES) * LANES) * (-(-columns // step) * step), dtype=dtype)
    OPS.pack_weight(packed, matrices.contiguous())
    return packed


def pack_layer(layer: LayerWeights, dtype: torch.dtype) -> list[torch.Tensor]:
    """The layer's tensors in the order of csrc/decode: matrices packed, an empty tensor for None."""
    none = torch.empty(0)

    def plain(tensor: torch.Tensor | None) -> torch.Tensor:
        return none if tensor is None else tensor.detach()

    def packed(tensor: torch.Tensor | None, dtype: torch.dtype = dtype) -> torch.Tensor:
        return none if tensor is None else pack_weight(tensor, dtype)

    return [
        plain(layer.attention_norm), packed(layer.qkv_proj), plain(layer.q_norm), plain(layer.k_norm), packed(layer.o_proj),
        plain(layer.mlp_norm), packed(layer.router, torch.float32), packed(layer.gate_up_proj), packed(layer.down_proj),
        plain(layer.expert_bias), packed(layer.shared_gate_up_proj), packed(layer.shared_down_proj)]


def pack_model(model: Transformer) -> DecodeModel:
    """Copies the model's weights, rounded to the compute dtype."""
    config, weights = model.config, []
    for block in model.blocks:
        assert isinstance(block, Block)
        weights += pack_layer(_layer_weights(block), model.compute_dtype)
    weights += [model.embedding.weight.detach().float(), model.norm.weight.detach(),
                pack_weight(model.head_weight, model.compute_dtype), model.rope]
    is_dense = config.num_experts == 1
    sizes = (
        config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.num_experts,
        1 if is_dense else config.num_experts_per_tok,
        config.intermediate_size if is_dense else config.moe_intermediate_size,
        0 if is_dense else config.num_shared_experts * config.moe_intermediate_size, model.vocab_size,
        config.max_position_embeddings, int(config.router_score == "sigmoid"), int(config.norm_topk_prob))
    return DecodeModel(weights, sizes, config.rms_norm_eps, model.compute_dtype)


def _layer_weights(block: Block) -> LayerWeights:
    attention, mlp = block.attention, block.mlp
    common: dict[str, Any] = {
        "attention_norm": block.attention_norm.weight, "mlp_norm": block.mlp_norm.weight,
        "qkv_proj": attention.qkv_proj.weight, "o_proj": attention.o_proj.weight,
        "q_norm": None if attention.q_norm is None else attention.q_norm.weight,
        "k_norm": None if attention.k_norm is None else attention.k_norm.weight}
    if isinstance(mlp, MLP):  # one expert that every token is routed to
        return LayerWeights(**common, gate_up_proj=mlp.gate_up_proj.weight[None], down_proj=mlp.down_proj.weight[None])
    shared: dict[str, Any] = {}
    if mlp.shared is not None:
        shared = {"shared_gate_up_proj": mlp.shared.gate_up_proj.weight, "shared_down_proj": mlp.shared.down_proj.weight}
    return LayerWeights(
        **common, **shared, router=mlp.router, gate_up_proj=mlp.gate_up_proj, down_proj=mlp.down_proj,
        expert_bias=mlp.expert_bias if mlp.config.expert_bias else None)


# --- the call

@dataclass(frozen=True)
class DecodeBatch:
    """R running sequences of P prompts; every field is i64 on the CPU."""

    newest: torch.Tensor
    """[R]: the newest token of each sequence; its key is not in the cache yet."""
    prefix_table: torch.Tensor
    """[P, blocks]: block table of each prompt."""
    prefix_lens: torch.Tensor
    """[P]"""
    prefix_index: torch.Tensor
    """[R]: each sequence's prompt."""
    own_table: torch.Tensor
    """[R, blocks]: block table of each sequence, with room for the keys of the tokens to be drawn."""
    own_lens: torch.Tensor
    """[R]: own tokens so far, the newest included."""
    limits: torch.Tensor
    """[R]: most tokens to draw for each sequence, at least 1."""
    noise_keys: torch.Tensor
    """[R]"""


def store_keys(keys: torch.Tensor, values: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
    """k, v [T, K, C] -> slots i64[T] of one layer's cache [K, num_blocks, BLOCK_SIZE, C], in this layout."""
    OPS.store_keys(keys, values, k.contiguous(), v.contiguous(), slots)


def decode(
    model: DecodeModel, batch: DecodeBatch, keys: torch.Tensor, values: torch.Tensor, *, stop_ids: Sequence[int],
    temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, with_routed_experts: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Draws up to `limits` tokens for each sequence, or up to a stop id.

    keys, values: [L, K, num_blocks, BLOCK_SIZE, C], filled by `store_keys`; the keys of all tokens but the
    last drawn are stored there. -> (tokens i64[R, M], logprobs f32[R, M], kept_logmass f32[R, M],
    routed_expert_ids i32[R, M, L, k] or None, num_new i64[R]). Sequence r has num_new[r] valid entries; the
    rest is uninitialised.
    """
    num_seqs = batch.newest.shape[0]
    check("decode", "newest", batch.newest, ("R",), torch.int64)
    check("decode", "limits", batch.limits, (num_seqs,), torch.int64)
    check("decode", "keys", keys, ("L", "K", "num_blocks", BLOCK_SIZE, "C"), DTYPES)
    most = int(batch.limits.max()) if num_seqs else 1
    if most < 1:
        raise ValueError(f"decode: limits must be at least 1, got at most {most}")

    # Outputs. The newest token is the input of the first step, so it precedes the drawn ones.
    tokens = torch.empty(num_seqs, 1 + most, dtype=torch.int64)
    tokens[:, 0] = batch.newest
    logprobs, kept_logmass = torch.empty(num_seqs, most), torch.empty(num_seqs, most)
    num_new = torch.empty(num_seqs, dtype=torch.int64)
    shape = (num_seqs, most, keys.shape[0], model.sizes[5]) if with_routed_experts else (0, 0, 0, 0)
    routed_expert_ids = torch.empty(shape, dtype=torch.int32)

    stops = torch.tensor(list(stop_ids), dtype=torch.int64)
    try:
        OPS.decode(
            tokens, logprobs, kept_logmass, num_new, routed_expert_ids, keys, values, batch.prefix_table, batch.prefix_lens,
            batch.prefix_index, batch.own_table, batch.own_lens, batch.limits, batch.noise_keys, stops, model.weights,
            list(model.sizes), model.eps, temperature, top_k, top_p, min_p)
    except RuntimeError as error:
        raise ValueError(str(error).splitlines()[0]) from error  # a bad argument, or NaN logits
    return tokens[:, 1:], logprobs, kept_logmass, routed_expert_ids if with_routed_experts else None, num_new
