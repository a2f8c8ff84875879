"""`decode`: several tokens for every running sequence, the whole model in one native call.

A decode step is small matrices and many ops; on a CPU most of its time would go into Python and into calls. Here each thread takes
its sequences through all layers and steps by itself. Nothing new is computed: csrc/decode calls the row functions of the ops that
the trainer calls, in the model's order, so tokens and logprobs are those of the op-by-op step, bit for bit.

There is no reference beside it: its specification is reason_rl/model/transformer.py, decoded op by op by reason_rl/engine.
Siblings: csrc/decode/, tests/kernels/test_decode.py, tests/reason_rl/test_engine_bits.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kernels.attention import BLOCK_SIZE
from kernels.checks import check
from kernels.dispatch import Implementation, Op
from kernels.native import DTYPES, OPS, cpu_unsupported_reason

__all__ = [
    "DecodeBatch", "DecodeModel", "LayerWeights", "cpu_unsupported_reason", "decode", "pack_layer", "pack_weight", "store_keys"]

OP = Op("decode", (Implementation("native", lambda *arguments: OPS.decode(*arguments), cpu_unsupported_reason, DTYPES),))
LANES = 16
"""Columns of a packed panel (csrc/common/gemm.h)."""


def pack_weight(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """weight: f32|dtype [N, K] or [E, N, K] -> dtype[...] in one dimension, in panels, rounded to `dtype`."""
    matrices = weight.detach() if weight.dim() == 3 else weight.detach()[None]
    count, rows, columns = matrices.shape
    step = 1 if dtype == torch.float32 else 2
    packed = torch.empty(count * (-(-rows // LANES) * LANES) * (-(-columns // step) * step), dtype=dtype)
    OPS.pack_weight(packed, matrices.contiguous())
    return packed


@dataclass(frozen=True)
class LayerWeights:
    """One layer as the model holds it; None where the model has no such part. Matrices f32 or in the compute dtype."""

    attention_norm: torch.Tensor
    qkv: torch.Tensor
    """[(H + 2K) * C, D]"""
    out: torch.Tensor
    """[D, H * C]"""
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor
    """[E, 2I, D]; [1, 2I, D] in a dense layer."""
    down: torch.Tensor
    """[E, D, I]"""
    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None
    router: torch.Tensor | None = None
    """f32[E, D]; None in a dense layer."""
    expert_bias: torch.Tensor | None = None
    shared_gate_up: torch.Tensor | None = None
    shared_down: torch.Tensor | None = None


def pack_layer(layer: LayerWeights, dtype: torch.dtype) -> list[torch.Tensor]:
    """In the order of csrc/decode: matrices packed, what is missing as an empty tensor."""
    none = torch.empty(0)

    def plain(tensor: torch.Tensor | None) -> torch.Tensor:
        return none if tensor is None else tensor.detach()

    def packed(tensor: torch.Tensor | None, dtype: torch.dtype = dtype) -> torch.Tensor:
        return none if tensor is None else pack_weight(tensor, dtype)

    return [
        plain(layer.attention_norm), packed(layer.qkv), plain(layer.q_norm), plain(layer.k_norm), packed(layer.out),
        plain(layer.mlp_norm), packed(layer.router, torch.float32), packed(layer.gate_up), packed(layer.down),
        plain(layer.expert_bias), packed(layer.shared_gate_up), packed(layer.shared_down)]


@dataclass(frozen=True)
class DecodeModel:
    weights: list[torch.Tensor]
    """`pack_layer` of each layer, then embedding f32[V, D], the last norm, the packed head, the angles f32[2, P, C / 2]."""
    sizes: tuple[int, ...]
    """hidden, heads, kv heads, head dim, experts, experts per token, expert size, shared size, vocabulary, positions, is sigmoid,
    is normalised."""
    eps: float
    dtype: torch.dtype


@dataclass(frozen=True)
class DecodeBatch:
    """The running sequences, R of them behind B prefixes; all i64 on the CPU."""

    newest: torch.Tensor
    """[R]: the newest token of each, whose key is not in the cache yet."""
    prefix_table: torch.Tensor
    """[B, NP]: blocks of each prefix."""
    prefix_lens: torch.Tensor
    """[B]"""
    prefix_index: torch.Tensor
    """[R]"""
    own_table: torch.Tensor
    """[R, NO]: blocks of each sequence, with room for the keys of the tokens to come."""
    own_lens: torch.Tensor
    """[R]: own tokens so far, the newest included."""
    limits: torch.Tensor
    """[R]: most tokens to draw for each, at least 1."""
    noise_keys: torch.Tensor
    """[R]"""


def store_keys(keys: torch.Tensor, values: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
    """k and v [T, K, C] into slots i64[T] of one layer's cache [K, num_blocks, BLOCK_SIZE, C], in `decode`'s layout."""
    OPS.store_keys(keys, values, k.contiguous(), v.contiguous(), slots)


def decode(
    model: DecodeModel, batch: DecodeBatch, keys: torch.Tensor, values: torch.Tensor, *, stop_ids: Sequence[int],
    temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, with_routes: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """keys, values: [L, K, num_blocks, BLOCK_SIZE, C], filled by `store_keys` -> (tokens i64[R, M], logprobs f32[R, M],
    kept_logmass f32[R, M], routes i32[R, M, L, k] or None, num_new i64[R]), M = the largest limit. Row r has num_new[r] valid
    entries: up to its limit, or to a stop id.
    The keys of all tokens but the last drawn are in the cache afterwards."""
    num_rows = batch.newest.shape[0]
    check("decode", "newest", batch.newest, ("R",), torch.int64)
    check("decode", "limits", batch.limits, (num_rows,), torch.int64)
    check("decode", "keys", keys, ("L", "K", "num_blocks", BLOCK_SIZE, "C"), DTYPES)
    most = int(batch.limits.max()) if num_rows else 1
    if most < 1:
        raise ValueError(f"decode: limits must be at least 1, got at most {most}")
    tokens = torch.empty(num_rows, 1 + most, dtype=torch.int64)
    tokens[:, 0] = batch.newest
    logprobs, kept = torch.empty(num_rows, most), torch.empty(num_rows, most)
    num_new = torch.empty(num_rows, dtype=torch.int64)
    routes = torch.empty((num_rows, most, keys.shape[0], model.sizes[5]) if with_routes else (0, 0, 0, 0), dtype=torch.int32)
    stops = torch.tensor(list(stop_ids), dtype=torch.int64)
    try:
        OP.choose(keys).run(
            tokens, logprobs, kept, num_new, routes, keys, values, batch.prefix_table, batch.prefix_lens, batch.prefix_index,
            batch.own_table, batch.own_lens, batch.limits, batch.noise_keys, stops, model.weights, list(model.sizes), model.eps,
            temperature, top_k, top_p, min_p)
    except RuntimeError as error:
        raise ValueError(str(error).splitlines()[0]) from error  # a bad argument, or logits that are no numbers
    return tokens[:, 1:], logprobs, kept, routes if with_routes else None, num_new
