"""`attention` and `paged_attention` (kernels/attention/) against torch's and FlashAttention's.

    causal    whole sequences without a prefix, which every implementation supports
    P x G     training packs: a prompt of P tokens once, then its G completions. The others have no shared
              prefix: they, and ours as "not shared", get a copy of the prompt with each completion. `percent`
              counts the work with a shared prompt for all of them
    decode    one query per sequence over a paged cache. `percent` is of the bandwidth and counts a prompt's
              bytes once per group
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
import torch.nn.functional as F

from bench.cases import Case, Inputs, Setup, Side
from bench.peers.ops import flash_attention
from bench.suite import main
from kernels.attention import BLOCK_SIZE, attention, make_inputs, paged_attention, plan_pages, plan_segments
from kernels.attention.reference import attention_reference, paged_attention_reference

BF16, F32 = torch.bfloat16, torch.float32
Heads = tuple[int, int, int]
Segments = list[tuple[int, int, int, int]]
LARGE, SMALL, TINY = (32, 8, 128), (4, 2, 32), (2, 1, 8)
"""(H, K, C) of an 8 B model, the default model and a test."""
CAUSAL = {"numbers": [(4, 4096, LARGE, BF16)], "small": [(64, 64, SMALL, BF16), (64, 64, SMALL, F32)], "tiny": [(2, 20, TINY, F32)]}
"""(sequences, length, heads, dtype)"""
PACKS = {"numbers": [(2, 512, 16, 512, LARGE, BF16), (2, 2048, 16, 512, LARGE, BF16), (2, 2048, 4, 512, LARGE, BF16),
                     (1, 8192, 16, 512, LARGE, BF16)],
         "small": [(16, 12, 16, 80, SMALL, BF16), (4, 256, 16, 64, SMALL, BF16)], "tiny": [(2, 20, 3, 9, TINY, F32)]}
"""(groups, P, G, tokens of each completion, heads, dtype)"""
DECODES = {"numbers": [(batch, 1, 2048, 2048, LARGE, BF16) for batch in (1, 4, 16, 64, 256)]
           + [(batch, 16, 2048, 2048, LARGE, BF16) for batch in (16, 64, 256)],
           "small": [(256, 16, 16, 64, SMALL, BF16), (1, 1, 16, 64, SMALL, BF16)], "tiny": [(6, 3, 32, 16, TINY, F32)]}
"""(sequences, G, tokens of the prompt, own tokens, heads, dtype): whole blocks"""
CHECKED = {LARGE: (4, 1, 128)}
"""Fewer heads, for the error: the reference keeps attention weights, 50 GB of float64 for all heads."""
WANTED = ("q", "k", "v")


def pack(groups: int, prompt: int, group_size: int, own: int) -> Segments:
    """Segments (start, length, prefix_start, prefix_length)."""
    found = []
    for first in range(0, groups * (prompt + group_size * own), prompt + group_size * own):
        found.append((first, prompt, 0, 0))
        found += [(first + prompt + number * own, own, first, prompt) for number in range(group_size)]
    return found


def with_plan(segments: Segments, heads: Heads, dtype: torch.dtype, device: torch.device) -> Inputs:
    inputs: Inputs = make_inputs(segments, *heads, dtype, str(device))
    return inputs | {"plan": plan_segments(inputs.pop("segments"), len(inputs["q"]), device)}


def whole_sequences(count: int, length: int, heads: Heads, dtype: torch.dtype, device: torch.device) -> Inputs:
    segments = [(number * length, length, 0, 0) for number in range(count)]
    bounds = torch.arange(count + 1, dtype=torch.int32, device=device) * length
    return with_plan(segments, heads, dtype, device) | {"cu_seqlens": bounds, "max_length": length}


def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Any, impl: str = "auto", **rest: Any) -> torch.Tensor:
    return attention(q, k, v, plan, impl=impl)


def by_reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Any, **rest: Any) -> torch.Tensor:
    return attention_reference(q, k, v, plan, q.shape[2] ** -0.5)


def by_sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, max_length: int, **rest: Any) -> torch.Tensor:
    """For sequences of one length."""
    batches = (x.view(-1, max_length, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*batches, is_causal=True, enable_gqa=True).transpose(1, 2).reshape(q.shape)


def varlen(setup: Setup, prepare: Any = None, select: Any = lambda out: out) -> Side | str:
    if setup.device.type != "cuda":
        return "CUDA only"
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return "not in this torch"
    known = inspect.signature(varlen_attn).parameters  # torch 2.11 and 2.13 name them differently
    options = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    options |= {"enable_gqa": True} if "enable_gqa" in known else {}

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, max_length: int, **rest: Any) -> Any:
        return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_length, max_length, **options)
    return Side(call, prepare, select)


def attention_work(segments: Segments, heads: Heads, dtype: torch.dtype) -> dict[str, Any]:
    num_heads, kv_heads, head_dim = heads
    pairs = sum(length * prefix + length * (length + 1) // 2 for _, length, _, prefix in segments)
    tokens = sum(length for _, length, _, _ in segments)
    num_bytes = dtype.itemsize * tokens * head_dim * (2 * num_heads + 2 * kv_heads)
    flops = 4 * num_heads * head_dim * pairs
    return {"forward": (flops, num_bytes), "backward": (2.5 * flops, 2 * num_bytes)}


def causal_case(setup: Setup, count: int, length: int, heads: Heads, dtype: torch.dtype) -> Case:
    return Case(
        op="attention", shape=f"causal {count} x {length}, H{heads[0]} K{heads[1]} C{heads[2]}", dtype=dtype, wanted=WANTED,
        exact=by_reference, make=lambda: whole_sequences(count, length, heads, dtype, setup.device),
        check=lambda: whole_sequences(count, length, CHECKED.get(heads, heads), dtype, setup.device),
        sides={**setup.ours("attention", ours, dtype), "scaled_dot_product_attention": Side(by_sdpa), "varlen_attn": varlen(setup),
               "flash-attn": flash_attention(setup.device, None, lambda out: out), **setup.compiled(by_reference)},
        work=attention_work([(0, length, 0, 0)] * count, heads, dtype))


def unshared(inputs: Inputs, groups: int, prompt: int, group_size: int, own: int) -> Inputs:
    """Each completion after a copy of its prompt."""
    # The packed index of each copied token.
    device, stride = inputs["q"].device, prompt + group_size * own
    first = torch.arange(groups, device=device)[:, None, None] * stride
    own_start = prompt + torch.arange(group_size, device=device)[:, None] * own
    place = torch.arange(prompt + own, device=device)
    index = (first + torch.where(place < prompt, place, own_start + place - prompt)).flatten()

    # The tensors, and a plan without prefixes.
    length, count = prompt + own, groups * group_size
    copied = {name: inputs[name].index_select(0, index) for name in WANTED}
    plan = plan_segments(torch.tensor([(n * length, length, 0, 0) for n in range(count)], dtype=torch.int32), len(index), device)
    bounds = torch.arange(count + 1, dtype=torch.int32, device=device) * length
    return copied | {"plan": plan, "cu_seqlens": bounds, "max_length": length}


def as_packed(out: torch.Tensor, groups: int, prompt: int, group_size: int, own: int) -> torch.Tensor:
    """The outputs of `unshared` [T', H, C] in the pack's order; the prompt's are those of its first copy."""
    sequences = out.view(groups, group_size, prompt + own, *out.shape[1:])
    return torch.cat((sequences[:, 0, :prompt], sequences[:, :, prompt:].flatten(1, 2)), 1).flatten(0, 1)


def pack_case(setup: Setup, groups: int, prompt: int, group_size: int, own: int, heads: Heads, dtype: torch.dtype) -> Case:
    sizes = {"groups": groups, "prompt": prompt, "group_size": group_size, "own": own}
    segments = pack(**sizes)
    alone = functools.partial(unshared, **sizes), functools.partial(as_packed, **sizes)
    return Case(
        op="attention", shape=f"{groups} x P{prompt} G{group_size} own {own}, H{heads[0]} K{heads[1]} C{heads[2]}", dtype=dtype,
        wanted=WANTED, exact=by_reference, make=lambda: with_plan(segments, heads, dtype, setup.device),
        check=lambda: with_plan(segments, CHECKED.get(heads, heads), dtype, setup.device),
        sides={**setup.ours("attention", ours, dtype), "not shared": Side(ours, *alone), "varlen_attn": varlen(setup, *alone),
               "flash-attn": flash_attention(setup.device, *alone)},
        work=attention_work(segments, heads, dtype))


def paged_inputs(
    rows: int, group_size: int, prompt: int, own: int, heads: Heads, dtype: torch.dtype, device: torch.device
) -> Inputs:
    """Blocks in random order, as in a cache that has been in use."""
    # Sizes.
    num_heads, kv_heads, head_dim = heads
    groups, prompt_blocks, own_blocks = rows // group_size, prompt // BLOCK_SIZE, own // BLOCK_SIZE
    num_blocks = groups * prompt_blocks + rows * own_blocks
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    # The prompt's blocks first, then those of each sequence.
    blocks = torch.randperm(num_blocks, generator=generator, device=device)
    prefix, mine = blocks[: groups * prompt_blocks], blocks[groups * prompt_blocks :]
    pages = plan_pages(
        prefix_table=prefix.view(groups, prompt_blocks), prefix_lens=torch.full((groups,), prompt, device=device),
        prefix_index=torch.arange(groups, device=device).repeat_interleave(group_size), own_table=mine.view(rows, own_blocks),
        own_lens=torch.full((rows,), own, device=device), num_kv_heads=kv_heads, num_blocks=num_blocks)
    return {"q": normal(rows, num_heads, head_dim), "k_cache": normal(kv_heads, num_blocks, BLOCK_SIZE, head_dim),
            "v_cache": normal(kv_heads, num_blocks, BLOCK_SIZE, head_dim), "pages": pages}


def contiguous(inputs: Inputs) -> Inputs:
    """Each sequence's keys and values contiguous, with its prompt's: k and v [R, K, S, C]."""
    pages = inputs["pages"]
    table = torch.cat((pages.prefix_table.index_select(0, pages.prefix_index), pages.own_table), 1)  # [R, blocks]
    k, v = (inputs[name][:, table].flatten(2, 3).transpose(0, 1).contiguous() for name in ("k_cache", "v_cache"))
    return {"q": inputs["q"][:, :, None], "k": k, "v": v}


def decode_case(
    setup: Setup, rows: int, group_size: int, prompt: int, own: int, heads: Heads, dtype: torch.dtype
) -> Case:
    num_heads, kv_heads, head_dim = heads
    keys = rows // group_size * prompt + rows * own
    flops, num_bytes = 4 * rows * (prompt + own) * num_heads * head_dim, 2 * keys * kv_heads * head_dim * dtype.itemsize

    def by_pages(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, pages: Any) -> torch.Tensor:
        return paged_attention_reference(q, k_cache, v_cache, pages, head_dim**-0.5)
    return Case(
        op="paged_attention", shape=f"decode {rows}, P{prompt} G{group_size} own {own}, H{num_heads} K{kv_heads} C{head_dim}",
        dtype=dtype, exact=by_pages, make=lambda: paged_inputs(rows, group_size, prompt, own, heads, dtype, setup.device),
        sides={**setup.ours("paged_attention", paged_attention, dtype),
               "scaled_dot_product_attention": Side(
                   lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), contiguous, lambda out: out[:, :, 0])},
        work={"forward": (flops, num_bytes)})


def cases(setup: Setup) -> list[Case]:
    causal, packs, decodes = ([make(setup, *shape) for shape in setup.pick(shapes)] for make, shapes in (
        (causal_case, CAUSAL), (pack_case, PACKS), (decode_case, DECODES)))
    return [causal[0], decodes[0], *packs, *decodes[1:], *causal[1:]]


if __name__ == "__main__":
    main("attention", cases)
