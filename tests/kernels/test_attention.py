"""Packed attention against a float64 loop over tokens, its gradients, and a segment's bits in any pack.

The loop has no tiles and no padding: for each token it gathers the visible keys, takes the softmax and sums.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from kernels.attention import OP, attention, make_inputs, plan, plan_segments, tiles
from kernels.triton_ops import IS_INTERPRETED
from tests.kernels.attention_cases import BF16, F32, HEADS, HEADS_AND_DTYPES, MIXED, Segment, by_hand, pack, plain
from tests.kernels.compare import THREADS, assert_no_worse_than_plain, same_bits, values_and_gradients
from tests.kernels.implementations import each_implementation

implementation = each_implementation(OP)

if IS_INTERPRETED:
    import triton
    import triton.language as tl

    from kernels.attention.triton_forward import row_offsets

    @triton.jit
    def show_offsets_kernel(out, token, first, K: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
        start, steps = row_offsets(tl.load(token), tl.load(first), tl.arange(0, 16), 1, K, R, C)
        tl.store(out + tl.arange(0, 16), start + steps)

# --- packed: numbers and gradients ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_values_and_gradients_are_no_worse_than_plain(heads: tuple[int, int, int], dtype: torch.dtype):
    inputs = make_inputs(pack([(6, [20, 1]), (40, [3, 50 if IS_INTERPRETED else 123])]), *heads, dtype)
    assert_no_worse_than_plain(attention, plain, by_hand, list(inputs.values()))


def test_segments_of_many_sizes_follow_the_definition():
    lengths, prefixes = [1, 3, 15, 16, 17, 47, 123, 128, 131], [0, 1, 15, 16, 17, 47, 112, 127, 128, 129]
    if IS_INTERPRETED:
        lengths, prefixes = [1, 47, 65], [0, 64, 129]
    for prefix in prefixes:
        segments = pack([(prefix, lengths)]) if prefix else [(sum(lengths[:i]), n, 0, 0) for i, n in enumerate(lengths)]
        inputs = make_inputs(segments, 2, 1, 16, F32, seed=prefix)
        exact = by_hand(*(inputs[x].double() for x in "qkv"), inputs["segments"])
        # sums of up to 260 terms of size 1 in f32: about 16 roundings of 6e-8 on average, at most 64
        torch.testing.assert_close(attention(**inputs).double(), exact, rtol=0, atol=4e-6)


def test_a_prefix_may_be_anywhere_before_its_segment():
    """The prefix is the second half of an earlier segment, with another segment in between."""
    segments = [(0, 40, 0, 0), (40, 5, 0, 0), (45, 30, 20, 20), (75, 3, 45, 30)]
    inputs = make_inputs(segments, 2, 2, 8, F32)
    exact = by_hand(*(inputs[x].double() for x in "qkv"), inputs["segments"])
    torch.testing.assert_close(attention(**inputs).double(), exact, rtol=0, atol=4e-6)  # as above


def test_scores_of_ten_thousand_stay_finite_and_right():
    inputs = make_inputs(MIXED[:3], 2, 1, 16, F32)
    inputs["q"] *= 1e4
    got = values_and_gradients(attention, list(inputs.values()))
    assert all(x.isfinite().all() for x in got)
    exact = by_hand(*(inputs[x].double() for x in "qkv"), inputs["segments"])
    # a score of 1e4 carries 1e-3 of rounding in f32, so a weight may be off by 0.1% of itself, and values are within 5
    torch.testing.assert_close(got[0].double(), exact, rtol=0, atol=2e-2)


@pytest.mark.parametrize("scale", [0.7, 0.0, -0.7])
def test_the_scale_is_the_callers(scale: float):
    inputs = make_inputs(MIXED[:3], 2, 1, 16, F32)
    got = values_and_gradients(partial(attention, scale=scale), list(inputs.values()))
    exact = [x.double() if x.is_floating_point() else x for x in inputs.values()]
    for value, want in zip(got, values_and_gradients(partial(by_hand, scale=scale), exact), strict=True):
        # as above; gradients are sums over up to 56 queries of products of such sums
        torch.testing.assert_close(value.double(), want, rtol=1e-5, atol=1e-5)


def test_gradients_have_the_same_bits_every_time():
    """A prefix's gradient is summed over its completions, always in the same order."""
    inputs = list(make_inputs(pack([(40, [3, 47, 20])]), 4, 2, 16, F32).values())
    torch.set_num_threads(2)
    first, second = (values_and_gradients(attention, inputs) for _ in range(2))
    assert all(same_bits(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("heads", [(2, 1, 16), (3, 1, 16)], ids=str)
def test_sums_over_readers_shared_out_to_programs_are_the_same_sums(heads: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch):
    """On a GPU several programs share the many readers of a prompt; elsewhere this changes nothing."""
    monkeypatch.setattr(tiles, "MIN_CHUNK", 2)
    segments = [(0, 70, 0, 0), *[(70 + 50 * i, 50, 5, 62) for i in range(4)]]  # a prefix that does not begin at a tile's edge
    inputs = make_inputs(segments, *heads, F32)
    assert len(plan_segments(inputs["segments"], 270).tables(heads[0], 1, 16, F32, torch.device("cpu")).parts) >= 2
    assert_no_worse_than_plain(attention, plain, by_hand, list(inputs.values()))


def test_strided_views_have_the_bits_of_copies():
    q, k, v, segments = make_inputs(pack([(6, [20])]), 4, 2, 16, F32).values()
    parts = torch.cat((q, k, v), dim=1).split((4, 2, 2), dim=1)
    assert same_bits(attention(*parts, segments), attention(q, k, v, segments))


def test_a_step_compiles_without_a_graph_break():
    q, k, v, segments = make_inputs(pack([(6, [20])]), 2, 1, 16, F32).values()
    plan_of_pack = plan_segments(segments, len(q))

    def loss(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention(q * 2, k, v, plan_of_pack)

    want = values_and_gradients(loss, [q, k, v])
    step = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert all(map(same_bits, values_and_gradients(step, [q, k, v]), want))


@pytest.mark.skipif(not IS_INTERPRETED, reason="of a Triton function")
def test_offsets_above_two_to_the_31_have_64_bits():
    out = torch.zeros(16, dtype=torch.int64)
    token, first = (torch.tensor([value], dtype=torch.int32) for value in (900_000, 2**21))
    show_offsets_kernel[(1,)](out, token, first, K=4, R=3, C=256)
    row = 2**21 + torch.arange(16)
    assert torch.equal(out, (900_000 + row // 3) * (12 * 256) + (3 + row % 3) * 256) and int(out[0]) > 2**31


def test_an_empty_pack_gives_an_empty_result():
    inputs = make_inputs([], 4, 2, 8, F32)
    assert attention(**inputs).shape == (0, 4, 8)


# --- bits ----------------------------------------------------------------------------------------------------------------

def alone(inputs: dict[str, torch.Tensor], segment: Segment) -> torch.Tensor:
    """The segment's rows from a pack of its prefix and itself alone."""
    start, length, prefix_start, prefix_length = segment
    rows = [*range(prefix_start, prefix_start + prefix_length), *range(start, start + length)]
    own = [(0, prefix_length, 0, 0), (prefix_length, length, 0, prefix_length)] if prefix_length else [(0, length, 0, 0)]
    q, k, v = (inputs[x][rows] for x in "qkv")
    return attention(q, k, v, torch.tensor(own, dtype=torch.int32))[prefix_length:]


@pytest.mark.parametrize(("heads", "dtype"), HEADS_AND_DTYPES, ids=str)
def test_a_segment_has_the_same_bits_alone_and_in_a_pack(heads: tuple[int, int, int], dtype: torch.dtype):
    inputs = make_inputs(MIXED, *heads, dtype)
    torch.set_num_threads(1)
    whole = attention(**inputs)
    for threads in THREADS[: 1 if IS_INTERPRETED else None]:
        torch.set_num_threads(threads)
        assert same_bits(attention(**inputs), whole)
        # All segments with one thread; a quarter with two, which is slow on a busy machine.
        for segment in MIXED[:: threads * threads]:
            assert same_bits(alone(inputs, segment), whole[segment[0] : segment[0] + segment[1]]), (segment, threads)


@pytest.mark.skipif(IS_INTERPRETED, reason="of the reference")
def test_cutting_a_pack_into_chunks_changes_no_bit(monkeypatch: pytest.MonkeyPatch):
    segments = pack([(20, [30] * 40)])
    inputs = make_inputs(segments, 2, 1, 16, F32)
    whole = attention(**inputs, impl="reference")
    monkeypatch.setattr(plan, "MAX_SCORES", 32 * 64 * 3)  # three of these segments at a time, one of the longer
    assert len(plan_segments(inputs["segments"], inputs["q"].shape[0]).chunks) == 15
    assert same_bits(attention(**inputs, impl="reference"), whole)


def test_one_groups_nan_does_not_reach_another():
    inputs = make_inputs(MIXED, 2, 1, 16, F32)
    clean = attention(**inputs)
    group = [segment for segment in MIXED if segment == MIXED[3] or segment[2:] == MIXED[3][:2]]  # the second: prompt, completions
    broken = slice(group[0][0], group[-1][0] + group[-1][1])
    for x in "qkv":
        inputs[x][broken] = torch.nan
    dirty = attention(**inputs)
    assert dirty[broken].isnan().all()
    kept = torch.ones(len(clean), dtype=torch.bool)
    kept[broken] = False
    assert same_bits(dirty[kept], clean[kept])


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


def test_wrong_arguments_raise_with_expected_and_actual():
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
