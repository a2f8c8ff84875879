"""Attention, packed and paged, against a float64 loop over tokens; and the bits that the two must share.

The loop knows nothing of tiles, blocks or padding: token by token it gathers the keys that the token may see, softmaxes, sums.
"""

from __future__ import annotations

import random
from functools import partial

import pytest
import torch

from kernels.attention import BLOCK_SIZE, OP, attention, make_inputs, paged_attention, plan, plan_pages, plan_segments
from kernels.attention.reference import KEY_TILE
from tests.kernels.compare import ROWS, THREADS, assert_no_worse_than_plain, same_bits, values_and_gradients

F32, BF16 = torch.float32, torch.bfloat16
IMPLS = [implementation.name for implementation in OP.implementations if not implementation.refuses(torch.device("cpu"), F32)]
Segment = tuple[int, int, int, int]
HEADS = [(1, 1, 8), (4, 2, 32), (6, 2, 16), (8, 1, 64), (2, 2, 12), (2, 1, 128)]  # (H, K, C)
# In bf16 the sums are the same f32 ones, rounded at the end: one shape tells.
HEADS_AND_DTYPES = [(heads, F32) for heads in HEADS] + [((4, 2, 32), BF16)]


@pytest.fixture(params=IMPLS)
def impl(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def pack(groups: list[tuple[int, list[int]]]) -> list[Segment]:
    """(prompt length, completion lengths) of each group -> segments; every completion has its group's prompt as prefix."""
    segments: list[Segment] = []
    position = 0
    for prompt, completions in groups:
        prompt_start = position
        segments.append((prompt_start, prompt, 0, 0))
        position += prompt
        for length in completions:
            segments.append((position, length, prompt_start, prompt))
            position += length
    return segments


# Lengths about a block (16), a query step (32) and a key tile (128), prefixes shorter and longer than each.
GROUPS = [(1, [3, 1]), (6, [47, 20]), (47, [123, 3]), (123, [1, 47]), (16, [128, 112, 113]), (130, [33, 1]), (15, []), (17, [64])]
MIXED = pack(GROUPS)


def visible(segment: Segment, place: int) -> list[int]:
    """Packed rows that the token at `place` of its segment may see."""
    start, _, prefix_start, prefix_length = segment
    return [*range(prefix_start, prefix_start + prefix_length), *range(start, start + place + 1)]


def by_hand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: torch.Tensor, scale: float | None = None) -> torch.Tensor:
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)  # [T, H, C]
    rows = []
    for segment in segments.tolist():
        for place in range(segment[1]):
            seen = torch.tensor(visible(segment, place))
            scores = torch.einsum("hc,jhc->hj", q[segment[0] + place], k.index_select(0, seen))
            weights = torch.softmax(scores * (q.shape[2] ** -0.5 if scale is None else scale), dim=-1)
            rows.append(torch.einsum("hj,jhc->hc", weights, v.index_select(0, seen)))
    return torch.stack(rows)


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T) v in the inputs' dtype, with one mask over the whole pack; the heads of a group are rows of one product."""
    num_tokens, num_heads, head_dim = q.shape
    mask = torch.full((num_tokens, num_tokens), -torch.inf, dtype=q.dtype)
    for segment in segments.tolist():
        for place in range(segment[1]):
            mask[segment[0] + place, visible(segment, place)] = 0.0
    repeat = num_heads // k.shape[1]
    rows = q.view(num_tokens, -1, repeat, head_dim).permute(1, 2, 0, 3).flatten(1, 2)  # [K, R * T, C]
    scores = rows @ k.permute(1, 2, 0) * head_dim ** -0.5 + mask.repeat(repeat, 1)
    out = torch.softmax(scores, dim=-1) @ v.transpose(0, 1)  # [K, R * T, C]
    return out.view(-1, repeat, num_tokens, head_dim).permute(2, 0, 1, 3).flatten(1, 2)


# --- packed: numbers and gradients ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_values_and_gradients_are_no_worse_than_plain(heads: tuple[int, int, int], dtype: torch.dtype, impl: str):
    inputs = make_inputs(pack([(6, [20, 1]), (40, [3, 123])]), *heads, dtype)
    assert_no_worse_than_plain(partial(attention, impl=impl), plain, by_hand, list(inputs.values()))


def test_segments_of_many_sizes_follow_the_definition(impl: str):
    lengths, prefixes = [1, 3, 15, 16, 17, 47, 123, 128, 131], [0, 1, 15, 16, 17, 47, 112, 127, 128, 129]
    for prefix in prefixes:
        segments = pack([(prefix, lengths)]) if prefix else [(sum(lengths[:i]), n, 0, 0) for i, n in enumerate(lengths)]
        inputs = make_inputs(segments, 2, 1, 16, F32, seed=prefix)
        exact = by_hand(*(inputs[x].double() for x in "qkv"), inputs["segments"])
        # sums of up to 260 terms of size 1 in f32: some 16 roundings of 6e-8 in the mean, all ways of error under 64
        torch.testing.assert_close(attention(**inputs, impl=impl).double(), exact, rtol=0, atol=4e-6)


def test_a_prefix_may_stand_anywhere_before_its_segment(impl: str):
    """Not the prompt right before it: the second half of an earlier segment, while another lies between."""
    segments = [(0, 40, 0, 0), (40, 5, 0, 0), (45, 30, 20, 20), (75, 3, 45, 30)]
    inputs = make_inputs(segments, 2, 2, 8, F32)
    exact = by_hand(*(inputs[x].double() for x in "qkv"), inputs["segments"])
    torch.testing.assert_close(attention(**inputs, impl=impl).double(), exact, rtol=0, atol=4e-6)  # as above


def test_scores_of_ten_thousand_stay_finite_and_right(impl: str):
    inputs = make_inputs(MIXED[:4], 2, 1, 16, F32)
    inputs["q"] *= 1e4
    got = values_and_gradients(partial(attention, impl=impl), list(inputs.values()))
    assert all(x.isfinite().all() for x in got)
    exact = by_hand(*(inputs[x].double() for x in "qkv"), inputs["segments"])
    # a score of 1e4 carries 1e-3 of rounding in f32, so a weight may be off by 0.1% of itself, and values are within 5
    torch.testing.assert_close(got[0].double(), exact, rtol=0, atol=2e-2)


def test_the_scale_is_the_callers(impl: str):
    inputs = make_inputs(MIXED[:3], 2, 1, 16, F32)
    exact = by_hand(*(inputs[x].double() for x in "qkv"), inputs["segments"], scale=0.7)
    torch.testing.assert_close(attention(**inputs, scale=0.7, impl=impl).double(), exact, rtol=0, atol=4e-6)  # as above
    assert not torch.allclose(attention(**inputs, impl=impl), attention(**inputs, scale=0.7, impl=impl), atol=1e-2)


def test_gradients_have_the_same_bits_every_time(impl: str):
    """A prefix's gradient is summed over its completions: always in their order."""
    inputs = list(make_inputs(pack([(40, [3, 47, 20])]), 4, 2, 16, F32).values())
    torch.set_num_threads(2)
    first, second = (values_and_gradients(partial(attention, impl=impl), inputs) for _ in range(2))
    assert all(same_bits(a, b) for a, b in zip(first, second, strict=True))


def test_an_empty_pack_gives_an_empty_result(impl: str):
    inputs = make_inputs([], 4, 2, 8, F32)
    assert attention(**inputs, impl=impl).shape == (0, 4, 8)


# --- bits ----------------------------------------------------------------------------------------------------------------

def alone(inputs: dict[str, torch.Tensor], segment: Segment, impl: str) -> torch.Tensor:
    """The segment's rows from a pack that holds its prefix and it, nothing else."""
    start, length, prefix_start, prefix_length = segment
    rows = [*range(prefix_start, prefix_start + prefix_length), *range(start, start + length)]
    own = [(0, prefix_length, 0, 0), (prefix_length, length, 0, prefix_length)] if prefix_length else [(0, length, 0, 0)]
    q, k, v = (inputs[x][rows] for x in "qkv")
    return attention(q, k, v, torch.tensor(own, dtype=torch.int32), impl=impl)[prefix_length:]


@pytest.mark.parametrize(("heads", "dtype"), HEADS_AND_DTYPES, ids=str)
def test_a_segment_has_the_same_bits_alone_and_in_a_pack(heads: tuple[int, int, int], dtype: torch.dtype, impl: str):
    inputs = make_inputs(MIXED, *heads, dtype)
    torch.set_num_threads(1)
    whole = attention(**inputs, impl=impl)
    for threads in THREADS:
        torch.set_num_threads(threads)
        assert same_bits(attention(**inputs, impl=impl), whole)
        for segment in MIXED[:: threads * threads]:  # all of them on one thread, a quarter on two: that is slow on a busy machine
            assert same_bits(alone(inputs, segment, impl), whole[segment[0] : segment[0] + segment[1]]), (segment, threads)


def test_cutting_a_pack_into_chunks_changes_no_bit(monkeypatch: pytest.MonkeyPatch):
    segments = pack([(20, [30] * 40)])
    inputs = make_inputs(segments, 2, 1, 16, F32)
    whole = attention(**inputs, impl="reference")
    monkeypatch.setattr(plan, "MAX_SCORES", 32 * 64 * 3)  # three of these segments at a time, one of the longer
    assert len(plan_segments(inputs["segments"], inputs["q"].shape[0]).chunks) == 15
    assert same_bits(attention(**inputs, impl="reference"), whole)


def test_one_groups_nan_does_not_reach_another(impl: str):
    inputs = make_inputs(MIXED, 2, 1, 16, F32)
    clean = attention(**inputs, impl=impl)
    broken = slice(MIXED[3][0], MIXED[3][0] + 73)  # the second group: prompt of 6, completions of 47 and 20
    for x in "qkv":
        inputs[x][broken] = torch.nan
    dirty = attention(**inputs, impl=impl)
    assert dirty[broken].isnan().all()
    kept = torch.ones(len(clean), dtype=torch.bool)
    kept[broken] = False
    assert same_bits(dirty[kept], clean[kept])


# --- paged ---------------------------------------------------------------------------------------------------------------

Query = tuple[Segment, int]
"""A token: its segment and its place there."""
GARBAGE = 1e4
"""What slots hold that were allotted but not written: anything finite must do. Blocks that no table names hold NaN."""


class Cache:
    """A paged cache filled token by token, its blocks handed out in a random order."""

    def __init__(self, inputs: dict[str, torch.Tensor], num_blocks: int, impl: str, seed: int = 0) -> None:
        self.inputs, self.impl = inputs, impl
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
        """Queries whose segments share a prefix name it once."""
        prefixes = list(dict.fromkeys(segment[2:] for segment, _ in queries))
        own = [self.store(*segment[:2])[: place // BLOCK_SIZE + 1] for segment, place in queries]
        pages = plan_pages(
            prefix_table=padded([self.store(*prefix) for prefix in prefixes], spare_blocks),
            prefix_lens=torch.tensor([length for _, length in prefixes]),
            prefix_index=torch.tensor([prefixes.index(segment[2:]) for segment, _ in queries]),
            own_table=padded(own, spare_blocks), own_lens=torch.tensor([place + 1 for _, place in queries]),
            num_kv_heads=self.keys.shape[0], num_blocks=self.keys.shape[1])
        rows = torch.stack([self.inputs["q"][segment[0] + place] for segment, place in queries])
        return paged_attention(rows, self.keys, self.values, pages, impl=self.impl)


def padded(tables: list[list[int]], spare_blocks: int) -> torch.Tensor:
    width = max(1, *map(len, tables)) + spare_blocks
    return torch.tensor([table + [0] * (width - len(table)) for table in tables])


def draw_queries(count: int, seed: int) -> list[Query]:
    rng = random.Random(f"{seed}/queries")
    segments = [rng.choice(MIXED) for _ in range(count)]
    return [(segment, rng.randrange(segment[1])) for segment in segments]


@pytest.mark.parametrize(("heads", "dtype"), HEADS_AND_DTYPES, ids=str)
def test_decoding_gives_the_bits_of_the_pack_in_any_batch(heads: tuple[int, int, int], dtype: torch.dtype, impl: str):
    inputs = make_inputs(MIXED, *heads, dtype)
    torch.set_num_threads(1)
    packed = attention(**inputs, impl=impl)
    cache = Cache(inputs, 120, impl)
    for threads in THREADS:
        torch.set_num_threads(threads)
        for count in ROWS[:8]:
            queries = draw_queries(count, seed=count)
            want = torch.stack([packed[segment[0] + place] for segment, place in queries])
            assert same_bits(cache.attend(queries, spare_blocks=count % 3), want), (count, threads)


def test_every_token_of_every_segment_decodes_to_the_bits_of_the_pack(impl: str):
    inputs = make_inputs(MIXED, 4, 2, 32, F32)
    packed, cache = attention(**inputs, impl=impl), Cache(inputs, 120, impl)
    for segment in MIXED:
        queries = [(segment, place) for place in range(segment[1])]
        assert same_bits(cache.attend(queries), packed[segment[0] : segment[0] + segment[1]]), segment


@pytest.mark.parametrize(("prompt", "completion"), [(200, 200), (250, 260), (680, 400)])
def test_parts_of_several_key_tiles_decode_to_the_bits_of_the_pack(prompt: int, completion: int, impl: str):
    """Past some 200 terms torch cuts a sum by its length, which padding differs between the forms: tiles keep below that."""
    segments = pack([(prompt, [completion, 9])])
    inputs = make_inputs(segments, 2, 1, 16, F32)
    packed, cache = attention(**inputs, impl=impl), Cache(inputs, 120, impl)
    for step in (4, 50, 1000):
        queries = [(segment, place) for segment in segments[1:] for place in range(0, segment[1], step)]
        assert same_bits(cache.attend(queries), torch.stack([packed[segment[0] + place] for segment, place in queries]))


def test_decoding_follows_the_definition(impl: str):
    inputs = make_inputs(MIXED, 4, 2, 16, F32)
    exact = by_hand(*(inputs[x].double() for x in "qkv"), inputs["segments"])
    queries = draw_queries(64, seed=5)
    want = torch.stack([exact[segment[0] + place] for segment, place in queries])
    torch.testing.assert_close(Cache(inputs, 120, impl).attend(queries).double(), want, rtol=0, atol=4e-6)  # as in packed


def test_where_the_blocks_lie_changes_no_bit(impl: str):
    inputs, queries = make_inputs(MIXED, 4, 2, 16, F32), draw_queries(40, seed=6)
    assert same_bits(Cache(inputs, 120, impl, seed=1).attend(queries), Cache(inputs, 200, impl, seed=2).attend(queries))


def test_paged_attention_of_no_rows_is_empty(impl: str):
    cache, none = torch.zeros(2, 3, BLOCK_SIZE, 8), torch.zeros(0, dtype=torch.int64)
    pages = plan_pages(prefix_table=none[:, None], prefix_lens=none, prefix_index=none, own_table=none[:, None], own_lens=none,
                       num_kv_heads=2, num_blocks=3)
    out = paged_attention(torch.zeros(0, 4, 8), cache, cache, pages, impl=impl)
    assert out.shape == (0, 4, 8)


def test_paged_attention_refuses_inputs_that_want_a_gradient(impl: str):
    cache, one = torch.zeros(2, 3, BLOCK_SIZE, 8), torch.zeros(1, dtype=torch.int64)
    pages = plan_pages(prefix_table=one[:, None], prefix_lens=one, prefix_index=one, own_table=one[:, None], own_lens=one + 1,
                       num_kv_heads=2, num_blocks=3)
    arguments = {"q": torch.zeros(1, 4, 8), "k_cache": cache, "v_cache": cache}
    for name, value in arguments.items():
        wanting = {**arguments, name: value.clone().requires_grad_()}
        with pytest.raises(ValueError, match="paged_attention has no gradient, but q, k_cache or v_cache requires one"):
            paged_attention(**wanting, pages=pages, impl=impl)
        with torch.no_grad():
            paged_attention(**wanting, pages=pages, impl=impl)


def test_a_key_tile_is_whole_blocks():
    assert KEY_TILE % BLOCK_SIZE == 0


# --- contracts -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("segments", "message"), [
    ([(0, 5, 0, 0)], "segments cover 5 tokens, the pack holds 8"),
    ([(0, 9, 0, 0)], "segments cover 9 tokens, the pack holds 8"),
    ([(1, 7, 0, 0)], "row 0 must start at 0 with length >= 1, got start 1, length 7"),
    ([(0, 3, 0, 0), (4, 4, 0, 0)], "row 1 must start at 3 with length >= 1, got start 4, length 4"),
    ([(0, 5, 0, 0), (4, 4, 0, 0)], "row 1 must start at 5 with length >= 1, got start 4, length 4"),
    ([(3, 5, 0, 0), (0, 3, 0, 0)], "row 0 must start at 0"),
    ([(0, 8, 0, 0), (8, 0, 0, 0)], "row 1 must start at 8 with length >= 1, got start 8, length 0"),
    ([(0, 8, 0, 3)], r"the prefix of segment 0 must lie in \[0, 0\), got start 0, length 3"),
    ([(0, 4, 0, 0), (4, 4, 2, 3)], r"the prefix of segment 1 must lie in \[0, 4\), got start 2, length 3"),
    ([(0, 4, 0, 0), (4, 4, -1, 3)], r"the prefix of segment 1 must lie in \[0, 4\), got start -1, length 3"),
    ([(0, 4, 0, 0), (4, 4, 0, -2)], r"the prefix of segment 1 must lie in \[0, 4\), got start 0, length -2"),
])
def test_bad_segments_are_refused(segments: list[Segment], message: str):
    with pytest.raises(ValueError, match=f"attention: .*{message}"):
        plan_segments(torch.tensor(segments, dtype=torch.int32), 8)


def test_segments_of_another_type_or_shape_are_refused():
    for bad in (torch.tensor([[0, 8, 0, 0]]), torch.zeros(4, dtype=torch.int32), torch.zeros(2, 3, dtype=torch.int32)):
        with pytest.raises(ValueError, match=r"attention: segments must be i32\[S, 4\] on cpu, got i"):
            plan_segments(bad, 8)


def test_wrong_arguments_are_named_with_what_was_expected_and_what_came():
    q, k, v, segments = make_inputs([(0, 8, 0, 0)], 4, 2, 16, F32).values()
    with pytest.raises(ValueError, match=r"attention: q must be .*\[T, H, C\], got f32\[8, 64\] on cpu"):
        attention(q.flatten(1), k, v, segments)
    with pytest.raises(ValueError, match=r"attention: k must be f32\[8, K, 16\], got f32\[7, 2, 16\] on cpu"):
        attention(q, k[:7], v, segments)
    with pytest.raises(ValueError, match=r"attention: v must be f32\[8, 2, 16\], got bf16\[8, 2, 16\] on cpu"):
        attention(q, k, v.bfloat16(), segments)
    with pytest.raises(ValueError, match=r"attention: the heads of q must be a multiple of the heads of k, got 3 and 2"):
        attention(q[:, :3], k, v, segments)
    with pytest.raises(ValueError, match=r"attention: the plan is for 8 tokens, q holds 7"):
        attention(q[:7], k[:7], v[:7], plan_segments(segments, 8))


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
