"""Paged attention: its values, and that a decoded token has the bits of packed attention for any batch and blocks."""

from __future__ import annotations

import random

import pytest
import torch

from kernels.attention import BLOCK_SIZE, OP, PAGED_OP, attention, make_inputs, paged_attention, plan_pages
from kernels.attention.reference import KEY_TILE
from kernels.triton_ops import IS_INTERPRETED
from tests.kernels.attention_cases import F32, HEADS_AND_DTYPES, MIXED, Segment, by_hand, pack
from tests.kernels.compare import ROWS, THREADS, same_bits
from tests.kernels.implementations import each_implementation

implementation = each_implementation(PAGED_OP, OP)

Query = tuple[Segment, int]
"""A token: its segment and its place there."""
GARBAGE = 1e4
"""What slots hold that were allotted but not written: anything finite must do. Blocks that no table names hold NaN."""


class Cache:
    """A paged cache filled token by token, its blocks handed out in a random order."""

    def __init__(self, inputs: dict[str, torch.Tensor], num_blocks: int, seed: int = 0) -> None:
        self.inputs = inputs
        num_kv_heads, head_dim = inputs["k"].shape[1:]
        shape = (num_kv_heads, num_blocks, BLOCK_SIZE, head_dim)
        self.keys, self.values = (torch.full(shape, torch.nan, dtype=inputs["k"].dtype) for _ in range(2))
        self.keys[:, 0] = self.values[:, 0] = GARBAGE  # block 0 pads the tables
        self.free = list(range(1, num_blocks))
        random.Random(f"{seed}/blocks").shuffle(self.free)
        self.stored: dict[tuple[int, int], list[int]] = {}

    def store(self, start: int, length: int) -> list[int]:
        """Rows [start, start + length) of the pack, from a block's first slot on -> their blocks. Stored once."""
        if (start, length) not in self.stored:
            blocks = [self.free.pop() for _ in range(-(-length // BLOCK_SIZE))]
            for name, cache in (("k", self.keys), ("v", self.values)):
                cache[:, blocks] = GARBAGE
                for place in range(length):
                    cache[:, blocks[place // BLOCK_SIZE], place % BLOCK_SIZE] = self.inputs[name][start + place]
            self.stored[start, length] = blocks
        return self.stored[start, length]

    def attend(self, queries: list[Query], spare_blocks: int = 0) -> torch.Tensor:
        """Queries whose segments share a prefix pass it once."""
        prefixes = list(dict.fromkeys(segment[2:] for segment, _ in queries))
        own = [self.store(*segment[:2])[: place // BLOCK_SIZE + 1] for segment, place in queries]
        pages = plan_pages(
            prefix_table=padded([self.store(*prefix) for prefix in prefixes], spare_blocks),
            prefix_lens=torch.tensor([length for _, length in prefixes]),
            prefix_index=torch.tensor([prefixes.index(segment[2:]) for segment, _ in queries]),
            own_table=padded(own, spare_blocks), own_lens=torch.tensor([place + 1 for _, place in queries]),
            num_kv_heads=self.keys.shape[0], num_blocks=self.keys.shape[1])
        rows = torch.stack([self.inputs["q"][segment[0] + place] for segment, place in queries])
        return paged_attention(rows, self.keys, self.values, pages)


def padded(tables: list[list[int]], spare_blocks: int) -> torch.Tensor:
    width = max(1, *map(len, tables)) + spare_blocks
    return torch.tensor([table + [0] * (width - len(table)) for table in tables])


def draw_queries(count: int, seed: int) -> list[Query]:
    rng = random.Random(f"{seed}/queries")
    segments = [rng.choice(MIXED) for _ in range(count)]
    return [(segment, rng.randrange(segment[1])) for segment in segments]


@pytest.mark.parametrize(("heads", "dtype"), HEADS_AND_DTYPES, ids=str)
def test_decoding_gives_the_bits_of_the_pack_in_any_batch(heads: tuple[int, int, int], dtype: torch.dtype):
    inputs = make_inputs(MIXED, *heads, dtype)
    torch.set_num_threads(1)
    packed = attention(**inputs)
    cache = Cache(inputs, 120)
    for threads in THREADS[: 1 if IS_INTERPRETED else None]:
        torch.set_num_threads(threads)
        for count in (1, 8) if IS_INTERPRETED else ROWS[:8]:
            queries = draw_queries(count, seed=count)
            want = torch.stack([packed[segment[0] + place] for segment, place in queries])
            assert same_bits(cache.attend(queries, spare_blocks=count % 3), want), (count, threads)


def test_every_token_of_every_segment_decodes_to_the_bits_of_the_pack():
    inputs = make_inputs(MIXED, 4, 2, 32, F32)
    packed, cache = attention(**inputs), Cache(inputs, 120)
    for segment in MIXED:
        places = range(0, segment[1], 13 if IS_INTERPRETED else 1)
        queries = [(segment, place) for place in places]
        assert same_bits(cache.attend(queries), packed[[segment[0] + place for place in places]]), segment


@pytest.mark.parametrize(("prompt", "completion"),
    [(150, 70)] if IS_INTERPRETED else [(200, 200), (250, 260), (680, 400)])
def test_parts_of_several_key_tiles_decode_to_the_bits_of_the_pack(prompt: int, completion: int):
    """Above about 200 terms torch splits a sum by its length, which padding changes from packed to paged; tiles
    are shorter than that."""
    segments = pack([(prompt, [completion, 9])])
    inputs = make_inputs(segments, 2, 1, 16, F32)
    packed, cache = attention(**inputs), Cache(inputs, 120)
    for step in (50, 1000) if IS_INTERPRETED else (4, 50, 1000):
        queries = [(segment, place) for segment in segments[1:] for place in range(0, segment[1], step)]
        assert same_bits(cache.attend(queries), torch.stack([packed[segment[0] + place] for segment, place in queries]))


def test_decoding_follows_the_definition():
    inputs = make_inputs(MIXED, 4, 2, 16, F32)
    exact = by_hand(*(inputs[x].double() for x in "qkv"), inputs["segments"])
    queries = draw_queries(9 if IS_INTERPRETED else 64, seed=5)
    want = torch.stack([exact[segment[0] + place] for segment, place in queries])
    torch.testing.assert_close(Cache(inputs, 120).attend(queries).double(), want, rtol=0, atol=4e-6)  # as in packed


def test_block_placement_changes_no_bit():
    inputs, queries = make_inputs(MIXED, 4, 2, 16, F32), draw_queries(9 if IS_INTERPRETED else 40, seed=6)
    assert same_bits(Cache(inputs, 120, seed=1).attend(queries), Cache(inputs, 200, seed=2).attend(queries))


@pytest.mark.parametrize("group_size", [1, 2, 16])
@pytest.mark.parametrize("prompt", [5, 70])
def test_a_group_of_any_size_decodes_as_each_of_it_alone(prompt: int, group_size: int):
    """The prompt's blocks are read once for the group; prompts shorter and longer than a key tile."""
    segments = pack([(prompt, [7] * group_size), (3, [9])])
    inputs = make_inputs(segments, 4, 2, 16, F32)
    cache = Cache(inputs, 120)
    queries = [(segment, segment[1] - 1) for segment in segments if segment[3]]
    together = cache.attend(queries[::-1])
    for row in (0, 1, len(queries) - 1):
        assert same_bits(cache.attend([queries[::-1][row]]), together[row : row + 1]), row


@pytest.mark.skipif(IS_INTERPRETED, reason="a thousand tiles, one after another")
def test_many_thousands_of_keys_are_one_row():
    """65,537 keys after the prefix, with equal scores: the result is the mean of the values."""
    num_keys = 65_537
    num_blocks = -(-num_keys // 16)
    values = torch.arange(num_blocks * 16 * 2, dtype=F32).view(1, num_blocks, 16, 2).remainder(7)
    table, one = torch.arange(num_blocks)[None], torch.tensor([0])
    pages = plan_pages(prefix_table=table[:, :1], prefix_lens=one, prefix_index=one, own_table=table, own_lens=one + num_keys,
                       num_kv_heads=1, num_blocks=num_blocks)
    out = paged_attention(torch.zeros(1, 1, 2), torch.ones_like(values), values, pages)
    want = values.view(-1, 2)[:num_keys].double().mean(0)
    # about a thousand sums of tiles in f32: 6e-5 at worst, a thirtieth of that on average
    torch.testing.assert_close(out.flatten().double(), want, rtol=1e-5, atol=0)


@pytest.mark.gpu
def test_blocks_past_two_to_the_31_numbers_are_found():
    num_blocks = 2**31 // (BLOCK_SIZE * 128) + 2
    cache = torch.zeros(1, num_blocks, BLOCK_SIZE, 128, dtype=torch.bfloat16, device="cuda")  # 4 GiB
    cache[0, -1] = torch.arange(128, device="cuda")
    own, one = torch.tensor([[num_blocks - 1]], device="cuda"), torch.ones(1, dtype=torch.int64, device="cuda")
    pages = plan_pages(prefix_table=own - own, prefix_lens=one - 1, prefix_index=one - 1, own_table=own, own_lens=3 * one,
                       num_kv_heads=1, num_blocks=num_blocks)
    out = paged_attention(torch.zeros(1, 4, 128, dtype=torch.bfloat16, device="cuda"), cache, cache, pages, impl="triton")
    assert torch.equal(out, cache[0, -1, :1].expand(4, -1)[None])


def test_paged_attention_of_no_rows_is_empty():
    cache, none = torch.zeros(2, 3, BLOCK_SIZE, 8), torch.zeros(0, dtype=torch.int64)
    pages = plan_pages(prefix_table=none[:, None], prefix_lens=none, prefix_index=none, own_table=none[:, None], own_lens=none,
                       num_kv_heads=2, num_blocks=3)
    out = paged_attention(torch.zeros(0, 4, 8), cache, cache, pages)
    assert out.shape == (0, 4, 8)


def test_paged_attention_refuses_inputs_that_require_a_gradient():
    cache, one = torch.zeros(2, 3, BLOCK_SIZE, 8), torch.zeros(1, dtype=torch.int64)
    pages = plan_pages(prefix_table=one[:, None], prefix_lens=one, prefix_index=one, own_table=one[:, None], own_lens=one + 1,
                       num_kv_heads=2, num_blocks=3)
    arguments = {"q": torch.zeros(1, 4, 8), "k_cache": cache, "v_cache": cache}
    for name, value in arguments.items():
        wanting = {**arguments, name: value.clone().requires_grad_()}
        with pytest.raises(ValueError, match="paged_attention has no gradient, but q, k_cache or v_cache requires one"):
            paged_attention(**wanting, pages=pages)
        with torch.no_grad():
            paged_attention(**wanting, pages=pages)


def test_a_key_tile_is_whole_blocks():
    assert KEY_TILE % BLOCK_SIZE == 0


# --- contracts -----------------------------------------------------------------------------------------------------------

def test_wrong_cache_arguments_are_named_too():
    zeros = torch.zeros(2, dtype=torch.int64)

    def call(**changed: torch.Tensor) -> None:
        caches = {
            "q": torch.zeros(2, 4, 8), "k_cache": torch.zeros(2, 3, BLOCK_SIZE, 8), "v_cache": torch.zeros(2, 3, BLOCK_SIZE, 8)}
        tables = {"prefix_table": zeros[:1, None], "prefix_lens": zeros[:1], "prefix_index": zeros,
                  "own_table": zeros[:, None], "own_lens": zeros + 1}
        pages = plan_pages(**{name: changed.get(name, value) for name, value in tables.items()}, num_kv_heads=2, num_blocks=3)
        paged_attention(**{name: changed.get(name, value) for name, value in caches.items()}, pages=pages)

    call()
    with pytest.raises(ValueError, match=r"paged_attention: k_cache must be f32\[2, 3, 16, 8\], got f32\[2, 3, 8, 8\]"):
        call(k_cache=torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"paged_attention: v_cache must be f32\[2, 3, 16, 8\], got f32\[2, 4, 16, 8\]"):
        call(v_cache=torch.zeros(2, 4, BLOCK_SIZE, 8))
    with pytest.raises(ValueError, match=r"plan_pages: prefix_table must be i64\[B, NP\], got i32\[1, 1\]"):
        call(prefix_table=zeros[:1, None].int())
    with pytest.raises(ValueError, match=r"plan_pages: prefix_lens must be i64\[1\], got i64\[2\]"):
        call(prefix_lens=zeros)
    with pytest.raises(ValueError, match=r"plan_pages: prefix_index must be i64\[2\], got i64\[1\]"):
        call(prefix_index=zeros[:1])
    with pytest.raises(ValueError, match=r"plan_pages: own_table must be i64\[R, NO\], got i64\[2\]"):
        call(own_table=zeros)
    with pytest.raises(ValueError, match=r"plan_pages: own_lens must be i64\[2\], got i64\[3\]"):
        call(own_lens=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"paged_attention: the heads of q must be a multiple of the heads of k, got 3 and 2"):
        call(q=torch.zeros(2, 3, 8))
