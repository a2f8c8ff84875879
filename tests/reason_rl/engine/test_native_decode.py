"""reason_rl.engine.native_decode checks its arguments: a bad one is an error and never a read out of bounds.

test_decoders.py and test_engine_bits.py compare its tokens and logprobs with the model's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from kernels.attention import BLOCK_SIZE
from kernels.linear_logprob import linear_logprob
from kernels.native import cpu_unsupported_reason
from kernels.rms_norm import rms_norm
from reason_rl.engine.native_decode import (
    DecodeBatch,
    DecodeModel,
    LayerWeights,
    decode,
    pack_layer,
    pack_weight,
    store_keys,
)
from tests.kernels.compare import same_bits

D, H, K, C, E, TOP, INNER, V, P, L, NUM_BLOCKS = 24, 4, 2, 6, 3, 2, 10, 19, 64, 2, 9
CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(bool(cpu_unsupported_reason(CPU)), reason=f"native kernels: {cpu_unsupported_reason(CPU)}")


def make_model(dtype: torch.dtype) -> DecodeModel:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    weights: list[torch.Tensor] = []
    for _ in range(L):
        weights += pack_layer(LayerWeights(
            torch.ones(D), draw((H + 2 * K) * C, D), draw(D, H * C), torch.ones(D), draw(E, 2 * INNER, D), draw(E, D, INNER),
            q_norm=torch.ones(C), router=draw(E, D)), dtype)
    angle = torch.arange(P)[:, None] * torch.tensor([1.0, 0.1, 0.01])
    weights += [draw(V, D), torch.ones(D), pack_weight(draw(V, D), dtype), torch.stack((angle.cos(), angle.sin()))]
    return DecodeModel(weights, (D, H, K, C, E, TOP, INNER, 0, V, P, 0, 1), 1e-6, dtype)


def make_batch() -> DecodeBatch:
    """Three sequences, two of them behind the first of two prefixes."""
    return DecodeBatch(
        newest=torch.tensor([1, 2, 3]), prefix_table=torch.tensor([[1], [2]]), prefix_lens=torch.tensor([5, 16]),
        prefix_index=torch.tensor([0, 1, 0]), own_table=torch.tensor([[3, 4], [5, 6], [7, 8]]), own_lens=torch.tensor([1, 14, 20]),
        limits=torch.tensor([4, 2, 3]), noise_keys=torch.tensor([11, 12, 13]))


def caches(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of noise in every slot."""
    generator = torch.Generator().manual_seed(1)
    keys, values = (torch.zeros(L, K, NUM_BLOCKS, BLOCK_SIZE, C, dtype=dtype) for _ in range(2))
    for layer in range(L):
        k, v = (torch.randn(NUM_BLOCKS * BLOCK_SIZE, K, C, generator=generator).to(dtype) for _ in range(2))
        store_keys(keys[layer], values[layer], k, v, torch.arange(NUM_BLOCKS * BLOCK_SIZE))
    return keys, values


def run(dtype: torch.dtype = torch.float32, batch: DecodeBatch | None = None, **options: Any) -> list[tuple[Any, ...]]:
    keys, values = caches(dtype)
    options = {"stop_ids": (), **options}
    tokens, logprobs, kept, _, num_new = decode(make_model(dtype), batch or make_batch(), keys, values, **options)
    return [(tokens[r, :n].tolist(), logprobs[r, :n].tolist(), kept[r, :n].tolist()) for r, n in enumerate(num_new.tolist())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_sequence_gets_its_limit_and_real_logprobs(dtype: torch.dtype):
    drawn = run(dtype)
    assert [len(tokens) for tokens, _, _ in drawn] == [4, 2, 3]
    assert all(0 <= t < V for tokens, _, _ in drawn for t in tokens)
    assert all(-50 < value < 0 for _, logprobs, _ in drawn for value in logprobs)
    assert run(dtype) == drawn


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_tokens_in_a_call_are_those_of_as_many_calls(dtype: torch.dtype):
    model, batch, (keys, values) = make_model(dtype), make_batch(), caches(dtype)
    one_by_one: list[list[int]] = [[], [], []]
    for number in range(2):
        batch = replace(batch, limits=torch.ones(3, dtype=torch.int64))
        tokens = decode(model, batch, keys, values, stop_ids=())[0]
        for row in range(3):
            one_by_one[row] += tokens[row].tolist()
        batch = replace(batch, newest=tokens[:, 0].clone(), own_lens=batch.own_lens + 1)
        assert number < 2
    assert one_by_one == [tokens[:2] for tokens, _, _ in run(dtype)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sequence_has_the_same_bits_alone(dtype: torch.dtype):
    together, batch = run(dtype), make_batch()
    for row in range(3):
        one = slice(row, row + 1)
        alone = replace(batch, newest=batch.newest[one], prefix_index=batch.prefix_index[one], own_table=batch.own_table[one],
                        own_lens=batch.own_lens[one], limits=batch.limits[one], noise_keys=batch.noise_keys[one])
        assert run(dtype, alone) == [together[row]]


def test_a_stop_id_ends_a_sequence_and_is_its_last_token():
    stop = run()[0][0][1]
    drawn = run(stop_ids=(V - 1, stop))
    assert drawn[0][0] == run()[0][0][:2] and drawn[0][0][-1] == stop


def test_greedy_takes_the_likeliest():
    drawn = run(temperature=0.0)
    assert drawn == run(temperature=0.0, batch=replace(make_batch(), noise_keys=torch.tensor([1, 2, 4])))


BAD: dict[str, tuple[Callable[[DecodeBatch], DecodeBatch], str]] = {
    "token": (lambda b: replace(b, newest=torch.tensor([1, V, 3])), rf"tokens must be in 0..{V - 1}, got {V}"),
    "negative token": (lambda b: replace(b, newest=torch.tensor([1, -1, 3])), f"tokens must be in 0..{V - 1}, got -1"),
    "block past the cache": (lambda b: replace(b, own_table=b.own_table + 1), rf"own_table must be in 0..{NUM_BLOCKS - 1}, got 9"),
    "block of two rows": (lambda b: replace(b, own_table=torch.tensor([[3, 4], [3, 6], [7, 8]])),
                          r"own_table\[1, 0\] must be a block of this row alone, got 3"),
    "block twice": (lambda b: replace(b, own_table=torch.tensor([[3, 4], [5, 6], [7, 7]])), r"own_table\[2, 1\] must be .*, got 7"),
    "block of a prefix": (lambda b: replace(b, own_table=torch.tensor([[3, 4], [2, 6], [7, 8]])), r"own_table\[1, 0\] .*, got 2"),
    "prefix block": (lambda b: replace(b, prefix_table=torch.tensor([[1], [-1]])), "prefix_table must be in 0..8, got -1 at 1"),
    "prefix length": (lambda b: replace(b, prefix_lens=torch.tensor([5, 17])), "prefix_lens must be in 0..16, got 17"),
    "prefix index": (lambda b: replace(b, prefix_index=torch.tensor([0, 2, 0])), "prefix_index must be in 0..1, got 2"),
    "no own token": (lambda b: replace(b, own_lens=torch.tensor([0, 14, 20])), "own_lens must be in 1..32, got 0 at 0"),
    "no length at all": (lambda b: replace(b, own_lens=torch.tensor([1, 2**63 - 1, 20])), f"own_lens .*, got {2**63 - 1} at 1"),
    "no room": (lambda b: replace(b, own_lens=torch.tensor([1, 14, 31])), r"own_lens\[2\] = 31 and limits\[2\] = 3 do not fit"),
    "rows": (lambda b: replace(b, own_lens=torch.tensor([1, 14])), r"own_lens must be i64\[3\] contiguous on cpu, got i64\[2\]"),
    "dtype": (lambda b: replace(b, prefix_lens=b.prefix_lens.int()), r"prefix_lens must be i64\[2\] contiguous.*, got i32\[2\]"),
    "layout": (lambda b: replace(b, own_table=b.own_table.T.contiguous().T), "own_table must be .* not contiguous"),
    "limit": (lambda b: replace(b, limits=torch.tensor([4, -1, 3])), "limits must be in 0..4, got -1"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_argument_raises_with_expected_and_actual(name: str):
    change, words = BAD[name]
    with pytest.raises(ValueError, match=words):
        run(batch=change(make_batch()))


def test_block_ids_beyond_the_keys_change_nothing():
    """Block tables are padded: sequences 0 and 1 have room in their first block; one block of the second prefix is full."""
    padded = replace(make_batch(), own_table=torch.tensor([[3, 1], [5, 5], [7, 8]]), prefix_table=torch.tensor([[1, 3], [2, 7]]))
    assert run(batch=padded) == run()


def test_a_position_past_the_model_is_refused():
    batch = replace(make_batch(), prefix_table=torch.tensor([[1, 1, 1], [2, 2, 2]]), prefix_lens=torch.tensor([5, 48]))
    with pytest.raises(ValueError, match="row 1 would reach position"):
        run(batch=replace(batch, own_lens=torch.tensor([1, 16, 20])))


def test_weights_of_another_size_are_refused():
    model, (keys, values) = make_model(torch.float32), caches(torch.float32)
    for place, words in ((1, "qkv must be"), (7, "gate_up must be"), (-1, "rope must be"), (-2, "head must be")):
        weights = list(model.weights)
        weights[place] = weights[place][..., :-1].contiguous()
        with pytest.raises(ValueError, match=words):
            decode(replace(model, weights=weights), make_batch(), keys, values, stop_ids=())
    with pytest.raises(ValueError, match="12 tensors a layer"):
        decode(replace(model, weights=model.weights[1:]), make_batch(), keys, values, stop_ids=())


@pytest.mark.parametrize(("place", "size", "words"), [
    (0, 2**62, r"sizes\[0\] must be in 0..1048576, got 4611686018427387904"), (4, 2**20 + 1, r"sizes\[4\] must be in 0..1048576"),
    (7, 2**40, r"sizes\[7\] must be in"), (8, -1, r"sizes\[8\] must be in"),
    (3, 258, "head dim must be even and in 2..256, got 258"), (3, 5, "head dim must be even and in 2..256, got 5")])
def test_sizes_whose_products_could_wrap_are_refused(place: int, size: int, words: str):
    model, (keys, values) = make_model(torch.float32), caches(torch.float32)
    sizes = (*model.sizes[:place], size, *model.sizes[place + 1 :])
    with pytest.raises(ValueError, match=words):
        decode(replace(model, sizes=sizes), make_batch(), keys, values, stop_ids=())


@pytest.mark.parametrize("num_hidden_layers", [0, L])
def test_subnormal_residuals_are_rounded_to_bf16_as_torch_does_it(num_hidden_layers: int):
    """The layers add nothing, so the residual is the embedding, of subnormal numbers; the norm then scales it up."""
    model, (keys, values) = make_model(torch.bfloat16), caches(torch.bfloat16)
    for layer in range(L):
        for matrix in (4, 8):  # out, down
            model.weights[12 * layer + matrix].zero_()
    embedding, norm, head = torch.randn(V, D) * 3e-39, torch.full((D,), 1e20), torch.randn(V, D)
    weights = [*model.weights[: 12 * num_hidden_layers], embedding, norm, pack_weight(head, torch.bfloat16), model.weights[-1]]
    model, batch = replace(model, weights=weights, eps=1e-36), replace(make_batch(), limits=torch.ones(3, dtype=torch.int64))
    drawn, logprobs, *_ = decode(model, batch, keys[:num_hidden_layers], values[:num_hidden_layers], stop_ids=(), temperature=0.0)
    hidden = rms_norm(embedding.bfloat16()[batch.newest], norm, 1e-36)
    assert float(hidden.float().abs().max()) > 0.5
    want, _ = linear_logprob(hidden, head, drawn[:, 0], 1.0)
    assert same_bits(logprobs[:, 0], want)


def test_broken_weights_are_an_error_and_not_a_token():
    model, (keys, values) = make_model(torch.float32), caches(torch.float32)
    model.weights[-3].fill_(torch.nan)
    with pytest.raises(ValueError, match="the logits of row 0 hold NaN or inf"):
        decode(model, make_batch(), keys, values, stop_ids=())


def test_slots_outside_the_cache_are_refused():
    keys, values = caches(torch.float32)
    k = torch.zeros(1, K, C)
    for slot in (-1, NUM_BLOCKS * BLOCK_SIZE):
        with pytest.raises(RuntimeError, match=f"slots must be in 0..143, got {slot}"):
            store_keys(keys[0], values[0], k, k, torch.tensor([slot]))


@pytest.mark.parametrize("head_dim", [0, 1, 7, 258])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_of_an_odd_head_dim_are_not_stored(dtype: torch.dtype, head_dim: int):
    cache, k = torch.zeros(K, 1, BLOCK_SIZE, head_dim, dtype=dtype), torch.zeros(1, K, head_dim, dtype=dtype)
    with pytest.raises(RuntimeError, match=f"store_keys: k's head dim must be even and in 2..256, got {head_dim}"):
        store_keys(cache, cache.clone(), k, k, torch.tensor([15]))
