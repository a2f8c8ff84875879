"""The tiles of the GPU's attention: each visible (query, key) pair is visited once in each pass, for any pack.
The compiler's output shows, without a GPU, that packed and paged attention sum a row in the same order.
"""

from __future__ import annotations

import random
import re
import sys
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kernels.ahead_of_time import build_for
from kernels.attention import attention, make_inputs, plan_segments, tiles
from kernels.attention.function import attention_flash
from kernels.triton_ops import IS_INTERPRETED
from tests.kernels.attention_cases import BF16, F32, Segment, pack

CPU = torch.device("cpu")


def draw_pack(seed: int) -> list[Segment]:
    """Segments of 1 to 300 tokens, most of them with a prefix anywhere before them, also across segments."""
    rng, segments, position = random.Random(f"{seed}/pack"), [], 0
    for _ in range(rng.randrange(1, 12)):
        length = rng.choice((1, 3, 47, 64, 128, rng.randrange(1, 300)))
        prefix = rng.randrange(position + 1) if rng.random() < 0.7 else 0
        segments.append((position, length, rng.randrange(position - prefix + 1), prefix))
        position += length
    return segments


def seen_pairs(segments: list[Segment]) -> torch.Tensor:
    """bool[T, T]: may the query (row) see the key (column)?"""
    seen = torch.zeros(*(2 * [sum(s[1] for s in segments)]), dtype=torch.int64)
    for start, length, prefix_start, prefix_length in segments:
        seen[start : start + length, prefix_start : prefix_start + prefix_length] += 1
        seen[start : start + length, start : start + length] += torch.ones(length, length, dtype=torch.int64).tril()
    return seen


def walk_readers(unit: list[int], readers: list[list[int]], repeat: int, block_rows: int, pairs: torch.Tensor) -> None:
    """One program of triton_backward.py's pass over keys adds the pairs that it visits to pairs i64[T * R, T]."""
    key_start, num_keys, first, past = unit
    for start, length, low, high, see_first, see_past in readers[first:past]:
        keys = torch.arange(max(key_start, see_first), min(key_start + num_keys, see_past))
        for row in range(low * block_rows, min(high * block_rows, length * repeat)):
            pairs[start * repeat + row, keys[keys <= start + row // repeat]] += 1


@pytest.mark.parametrize("repeat", [1, 3, 4])
@pytest.mark.parametrize("seed", range(4))
def test_each_pair_is_walked_once(seed: int, repeat: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tiles, "MIN_CHUNK", 1 + 2 * (seed % 2))
    segments = draw_pack(seed)
    config = tiles.key_config(128, BF16)
    found = tiles.make_tables(torch.tensor(segments, dtype=torch.int32), repeat, 1, 128, BF16)
    want = seen_pairs(segments).repeat_interleave(repeat, dim=0)
    pairs, readers = torch.zeros_like(want), found.readers.tolist()
    for unit in found.parts.tolist() + found.wholes.tolist():
        walk_readers(unit, readers, repeat, config["BLOCK_M"], pairs)
    assert torch.equal(pairs, want)
    # The parts of a tile are adjacent, and merged once; their readers are in the pack's order.
    merged = [number for _, _, first, past in found.merges.tolist() for number in range(first, past)]
    assert merged == list(range(len(found.parts)))
    for key_start, num_keys, first, past in found.merges.tolist():
        assert past - first > 1 and {(key_start, num_keys)} == {tuple(row[:2]) for row in found.parts[first:past].tolist()}
        rows = [(r[0], r[2], r[3]) for r in found.readers[found.parts[first, 2] : found.parts[past - 1, 3]].tolist()]
        assert rows == sorted(rows) and all(a[0] != b[0] or a[2] == b[1] for a, b in pairwise(rows))
    rows = torch.zeros(want.shape[0], dtype=torch.int64)
    for start, length, _, _, first in found.tiles.tolist():
        rows[start * repeat + first : start * repeat + min(first + 128, length * repeat)] += 1
    assert rows.eq(1).all()


def test_more_tokens_than_two_bytes_count_are_cut_in_bounded_parts():
    """65,537 tokens of one segment, and a prompt with a thousand readers: programs and their memory stay bounded."""
    long = tiles.make_tables(torch.tensor([[0, 65_537, 0, 0]], dtype=torch.int32), 8, 8, 128, BF16)
    assert long.tiles.shape == (-(-65_537 * 8 // 128), 5) and int(long.tiles[:, 4].max()) == 65_537 * 8 // 128 * 128
    many = tiles.make_tables(torch.tensor(pack([(300, [500] * 1000)]), dtype=torch.int32), 4, 8, 128, BF16)
    num_keys = tiles.key_config(128, BF16)["BLOCK_N"]
    for found, num_tokens in ((long, 65_537), (many, 500_300)):
        assert int(found.tiles.min()) >= 0 and len(found.parts) <= tiles.NUM_UNITS // 8 + len(found.merges)
        assert len(found.wholes) + len(found.merges) >= -(-num_tokens // num_keys)
    assert len(many.parts) >= 3 * 8  # the prompt's three tiles of keys


@pytest.mark.gpu
def test_a_segment_of_65_537_tokens_is_averaged_right():
    """Equal scores: a token's result is the mean of the values up to it; a key's gradient is that of the later tokens."""
    num_tokens = 65_537
    q, k = (torch.zeros(num_tokens, heads, 64, device="cuda", dtype=BF16) for heads in (4, 1))
    v = torch.arange(num_tokens, device="cuda").remainder(7).view(-1, 1, 1).expand(-1, 1, 64).to(BF16).requires_grad_()
    segments = torch.tensor([[0, num_tokens, 0, 0]], dtype=torch.int32)
    out = attention(q, k, v, segments, impl="triton")
    count = torch.arange(1, num_tokens + 1, device="cuda", dtype=torch.float64)
    want = v.detach()[:, 0, 0].double().cumsum(0) / count
    torch.testing.assert_close(out[:, 2, 5].double(), want, rtol=2**-7, atol=1e-3)  # one bf16 rounding
    out.sum().backward()
    want = 4 * (1 / count).flip(0).cumsum(0).flip(0)
    torch.testing.assert_close(v.grad[:, 0, 5].double(), want, rtol=2**-7, atol=1e-3)  # type: ignore[index]


def test_the_tables_of_a_pack_are_made_once():
    plan = plan_segments(torch.tensor(pack([(6, [3, 4])]), dtype=torch.int32), 13)
    assert plan.tables(2, 2, 32, F32, CPU) is plan.tables(2, 2, 32, F32, CPU)
    assert plan.tables(4, 2, 32, F32, CPU) is not plan.tables(2, 2, 32, F32, CPU)


def test_too_many_heads_for_a_tile_are_refused():
    with pytest.raises(ValueError, match="paged_attention: at most 128 heads can share a kv head here, got 129"):
        tiles.paged_config(64, BF16, 129, 90)


# --- the order of a row's sum ----------------------------------------------------------------------------------------------

def sum_layouts(what: Any, capability: int) -> set[str]:
    """The layout over registers, lanes and warps of the columns that a kernel sums: it fixes the order of the sum."""
    code = build_for(what, capability)[0].asm["ttgir"]
    named = dict(re.findall(r"^(#\w+) = (#ttg.*)$", code, re.MULTILINE))
    reduced = set(re.findall(r"\}\) : \(tensor<\d+x\d+xf32, (#\w+)>\) -> tensor<\d+xf32", code))
    assert reduced, what.name
    return {columns_of(named[name]) for name in reduced}


def columns_of(layout: str) -> str:
    """The column part of a layout: of a linear layout the second entry of each basis, else the last of each list."""
    if "linear" in layout:
        parts = re.findall(r"(register|lane|warp) = \[(.*?)\](?=, \w+ =|\})", layout)
        return str([(name, [column for column in re.findall(r"\[\d+, (\d+)\]", bases) if column != "0"]) for name, bases in parts])
    return re.sub(r"= \[\d+, ", "= [", layout)


@pytest.mark.skipif(IS_INTERPRETED, reason="a kernel for the interpreter cannot be compiled")
@pytest.mark.parametrize(("capability", "form"), [
    (80, (128, BF16, 4)), (90, (128, BF16, 4)), (90, (32, F32, 2)), (100, (32, BF16, 2))], ids=str)
def test_packed_and_paged_sum_a_row_in_the_same_order(capability: int, form: tuple[int, torch.dtype, int]):
    pytest.importorskip("triton")
    from kernels.attention.triton_kernel import forms

    packed, _, _, prefix, own = forms(*form, capability)
    want = sum_layouts(packed, capability)
    assert len(want) == 1 and sum_layouts(prefix, capability) == sum_layouts(own, capability) == want


def test_only_the_rows_of_a_layout_are_left_out_of_the_comparison():
    def mma(warps: str, width: int) -> str:
        return columns_of(f"#ttg.nvidia_mma<{{versionMajor = 3, warpsPerCTA = [{warps}], instrShape = [16, {width}, 16]}}>")

    def linear(lane: int, warp: int) -> str:
        return columns_of(f"#ttg.linear<{{register = [[0, 1]], lane = [[1, 0], [0, {lane}]], warp = [[{warp}, 0]], block = []}}>")

    assert mma("4, 1", 64) == mma("8, 1", 64) and mma("1, 4", 64) != mma("4, 1", 64) != mma("4, 1", 32)
    assert linear(4, 16) == linear(4, 32) != linear(8, 32)


# --- flash-attn --------------------------------------------------------------------------------------------------------------

def test_flash_attn_gets_the_segments_as_they_are(monkeypatch: pytest.MonkeyPatch):
    calls = []

    def called(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append((args[3:], kwargs))
        return args[0] * 2

    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=called))
    q, k, v, segments = make_inputs([(0, 5, 0, 0), (5, 9, 0, 0)], 4, 2, 16, BF16).values()
    assert torch.equal(attention_flash(q, k, v, plan_segments(segments, 14), 0.3), q * 2)
    (ends, same_ends, longest, same_longest), options = calls[0]
    assert ends.tolist() == same_ends.tolist() == [0, 5, 14] and ends.dtype == torch.int32 and (longest, same_longest) == (9, 9)
    assert options == {"softmax_scale": 0.3, "causal": True}


def test_flash_attn_refuses_a_shared_prefix_and_where_it_cannot_run():
    q, k, v, segments = make_inputs(pack([(5, [9])]), 4, 2, 16, BF16).values()
    with pytest.raises(ValueError, match="impl='flash_attn' takes segments without a shared prefix, got one of 5 tokens"):
        attention_flash(q, k, v, plan_segments(segments, 14), 0.3)
    with pytest.raises(ValueError, match="attention: impl='flash_attn' cannot run on cpu: CUDA only"):
        attention(q, k, v, segments, impl="flash_attn")


@pytest.mark.gpu
def test_flash_attn_is_near_the_reference():
    pytest.importorskip("flash_attn")
    q, k, v, segments = make_inputs([(0, 50, 0, 0), (50, 90, 0, 0)], 4, 2, 64, BF16).values()
    q, k, v = q.cuda(), k.cuda(), v.cuda()
    got, want = (attention(q, k, v, segments, impl=impl) for impl in ("flash_attn", "reference"))
    torch.testing.assert_close(got, want, rtol=0, atol=4e-2)  # two bf16 roundings of values below 4: the weights', the result's
