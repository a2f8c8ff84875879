"""The native attention, beyond test_attention.py: head dims, threads and slices, poisoned outputs, and refusals.

Skipped, with the reason, if no library is built.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kernels.attention import attention, make_inputs, paged_attention, plan_pages
from kernels.native import OPS, cpu_unsupported_reason
from tests.kernels.compare import THREADS, assert_no_worse_than_plain, same_bits, values_and_gradients

F32, BF16 = torch.float32, torch.bfloat16
UNSUPPORTED_REASON = cpu_unsupported_reason(torch.device("cpu"))
pytestmark = pytest.mark.skipif(bool(UNSUPPORTED_REASON), reason=UNSUPPORTED_REASON)
native, reference = partial(attention, impl="native"), partial(attention, impl="reference")

FAMILY = [(0, 6, 0, 0), (6, 47, 0, 6), (53, 3, 0, 6)]
NESTED = [(0, 40, 0, 0), (40, 5, 0, 0), (45, 30, 20, 20), (75, 123, 45, 30), (198, 9, 30, 15)]  # the last prefix: of two segments
INTERLEAVED = [(0, 9, 0, 0), (9, 17, 0, 0), (26, 20, 0, 9), (46, 5, 9, 17), (51, 33, 0, 9)]
PACKS = {"family": FAMILY, "nested": NESTED, "interleaved": INTERLEAVED, "one": [(0, 1, 0, 0)], "long": [(0, 700, 0, 0)]}


def arguments(segments: list[tuple[int, int, int, int]], heads: tuple[int, int, int], dtype: torch.dtype, seed: int = 0) -> Any:
    return list(make_inputs(segments, *heads, dtype, seed=seed).values())


@pytest.mark.parametrize("head_dim", [2, 6, 16, 18, 46, 48, 80, 112, 256])
def test_every_even_head_dim_is_as_good_as_the_reference(head_dim: int):
    """The reference also widens bf16 and computes in f32, so it is the plain version here."""
    for dtype in (F32, BF16):
        assert_no_worse_than_plain(native, reference, reference, arguments(FAMILY, (6, 3, head_dim), dtype))


@pytest.mark.parametrize("head_dim", [1, 7, 258])
def test_head_dims_that_it_does_not_take_go_to_the_reference(head_dim: int):
    q, k, v, segments = arguments([(0, 17, 0, 0)], (4, 2, head_dim), F32)
    assert same_bits(attention(q, k, v, segments), reference(q, k, v, segments))
    with pytest.raises(RuntimeError, match=f"attention_fwd: q's head dim must be even, from 2 to 256, got {head_dim}"):
        native(q, k, v, segments)
    # The last token, with its keys in a cache, has the bits of the pack: two blocks, behind an empty prefix.
    cache = [F.pad(x, (0, 0, 0, 0, 0, 15)).transpose(0, 1).reshape(2, 2, 16, head_dim).contiguous() for x in (k, v)]
    one = torch.tensor([0])
    pages = plan_pages(prefix_table=one[:, None], prefix_lens=one, prefix_index=one, own_table=torch.tensor([[0, 1]]),
                       own_lens=one + 17, num_kv_heads=2, num_blocks=2)
    assert same_bits(paged_attention(q[16:], *cache, pages), attention(q, k, v, segments)[16:])
    with pytest.raises(RuntimeError, match="paged_attention: q's head dim must be even"):
        paged_attention(q[16:], *cache, pages, impl="native")


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("name", PACKS)
def test_any_pack_is_as_good_as_the_reference(name: str, dtype: torch.dtype):
    assert_no_worse_than_plain(native, reference, reference, arguments(PACKS[name], (6, 2, 16), dtype))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("name", PACKS)
@pytest.mark.parametrize("heads", [(2, 1, 32), (8, 4, 18)], ids=str)
def test_results_and_gradients_have_the_same_bits_with_any_number_of_threads(
    name: str, heads: tuple[int, int, int], dtype: torch.dtype
):
    inputs = arguments(PACKS[name], heads, dtype)
    torch.set_num_threads(1)
    want = values_and_gradients(native, inputs)
    for threads in (*THREADS, 3):
        torch.set_num_threads(threads)
        for _ in range(2):
            assert all(map(same_bits, values_and_gradients(native, inputs), want)), threads


def test_a_group_has_the_same_gradients_alone_and_with_others():
    """Holds for a pack of many groups; few groups are cut into slices, which changes the order of a sum."""
    segments = [(start + s, length, start + p, prefix) for start in range(0, 560, 56) for s, length, p, prefix in FAMILY]
    inputs = arguments(segments, (4, 2, 32), F32)
    whole = values_and_gradients(native, inputs)
    inputs[0][:56] *= 3.0  # the first group changes, the rest must not
    changed = values_and_gradients(native, inputs)
    assert all(same_bits(a[56:], b[56:]) for a, b in zip(changed, whole, strict=True))
    assert not any(same_bits(a[:56], b[:56]) for a, b in zip(changed, whole, strict=True))


def test_one_groups_nan_does_not_reach_anothers_gradients():
    inputs = arguments(INTERLEAVED, (2, 1, 16), F32)
    clean = values_and_gradients(native, inputs)
    broken = torch.zeros(84, dtype=torch.bool)
    broken[9:26] = broken[46:51] = True  # the second group
    for x in inputs[:3]:
        x[broken] = torch.nan
    for got, want in zip(values_and_gradients(native, inputs), clean, strict=True):
        assert same_bits(got[~broken], want[~broken])
        assert got[broken].isnan().all()


@pytest.mark.parametrize("scale", [0.0, -0.7, 1.0])
def test_gradients_follow_any_scale(scale: float):
    inputs = arguments(FAMILY, (2, 1, 16), F32)
    plain = partial(reference, scale=scale)
    assert_no_worse_than_plain(partial(native, scale=scale), plain, plain, inputs)


def test_scores_of_ten_thousand_have_finite_gradients():
    inputs = arguments(NESTED, (2, 1, 16), BF16)
    inputs[0] *= 1e4
    assert all(x.isfinite().all() for x in values_and_gradients(native, inputs))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_every_element_is_written(dtype: torch.dtype):
    q, k, v, segments = arguments(NESTED, (4, 2, 18), dtype)
    out, dq, dk, dv = (torch.full_like(x, torch.nan) for x in (q, q, k, v))
    stats = torch.full((2, len(q), 2, 2), torch.nan)
    OPS.attention_fwd(out, stats, q, k, v, segments, 0.3)
    OPS.attention_bwd(dq, dk, dv, torch.ones_like(q), out, stats, q, k, v, segments, 0.3)
    assert all(x.isfinite().all() for x in (out, stats, dq, dk, dv))


# --- calls of the native op: an error names the argument, before anything is read or written -------------------------------

PACKED = {"out": torch.zeros(8, 4, 16), "stats": torch.zeros(2, 8, 2, 2), "q": torch.zeros(8, 4, 16), "k": torch.zeros(8, 2, 16),
          "v": torch.zeros(8, 2, 16), "segments": torch.tensor([[0, 3, 0, 0], [3, 5, 0, 3]], dtype=torch.int32), "scale": 1.0}
BACKWARD = {"dq": torch.zeros(8, 4, 16), "dk": torch.zeros(8, 2, 16), "dv": torch.zeros(8, 2, 16), "dout": torch.zeros(8, 4, 16)}
ZEROS = torch.zeros(2, dtype=torch.int64)
CACHE = torch.zeros(2, 3, 16, 8)
PAGED = {"out": torch.zeros(2, 4, 8), "q": torch.zeros(2, 4, 8), "k_cache": CACHE, "v_cache": CACHE,
         "prefix_table": ZEROS[:1, None], "prefix_lens": ZEROS[:1], "prefix_index": ZEROS, "own_table": ZEROS[:, None],
         "own_lens": ZEROS + 1, "scale": 1.0}


def segments_of(*rows: tuple[int, int, int, int]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int32)


@pytest.mark.parametrize(("name", "value", "message"), [
    ("out", torch.zeros(8, 4, 8), r"out must be f32\[8, 4, 16\].*, got f32\[8, 4, 8\]"),
    ("out", torch.zeros(8, 16, 4).transpose(1, 2), r"out must be .* contiguous on cpu, got f32\[8, 4, 16\] not contiguous"),
    ("stats", torch.zeros(8, 4), r"stats must be f32\[2, 8, 2, 2\].*, got f32\[8, 4\]"),
    ("q", torch.zeros(8, 4, 16, dtype=torch.float64), "q must be f32 or bf16"),
    ("q", torch.zeros(8, 3, 16), "the heads of q must be a multiple of those of k, got 3 and 2"),
    ("q", torch.zeros(8, 4, 15), "q's head dim must be even, from 2 to 256, got 15"),
    ("q", torch.zeros(8, 4, 258), "q's head dim must be even, from 2 to 256, got 258"),
    ("k", torch.zeros(7, 2, 16), r"k must be f32\[8, 2, 16\].*, got f32\[7, 2, 16\]"),
    ("k", torch.zeros(8, 2), "q and k must have 3 dimensions, got 3 and 2"),
    ("v", torch.zeros(8, 2, 16).bfloat16(), r"v must be f32\[8, 2, 16\].*, got bf16"),
    ("segments", torch.zeros(2, 4), r"segments must be i32\[\?, 4\].*, got f32"),
    ("segments", segments_of((0, 3, 0, 0)), "segments cover 3 tokens, the pack holds 8"),
    ("segments", segments_of((0, 3, 0, 0), (4, 4, 0, 0)), "row 1 must start at 3 with length >= 1, got start 4, length 4"),
    ("segments", segments_of((0, 9, 0, 0), (9, -1, 0, 0)), "row 1 must start at 9 with length >= 1, got start 9, length -1"),
    ("segments", segments_of((0, 3, 0, 0), (3, 5, 1, 3)), r"the prefix of row 1 must lie in \[0, 3\), got start 1, length 3"),
    ("segments", segments_of((0, 3, 0, 0), (3, 5, -1, 3)), r"the prefix of row 1 must lie in \[0, 3\), got start -1, length 3"),
    ("segments", segments_of((0, 3, 0, 0), (3, 5, 0, -3)), r"the prefix of row 1 must lie in \[0, 3\), got start 0, length -3"),
])
def test_packed_attention_refuses(name: str, value: torch.Tensor, message: str):
    OPS.attention_fwd(*PACKED.values())
    OPS.attention_bwd(*{**BACKWARD, **PACKED}.values())
    with pytest.raises(RuntimeError, match=f"attention_fwd: .*{message}"):
        OPS.attention_fwd(*{**PACKED, name: value}.values())
    with pytest.raises(RuntimeError, match=f"attention_bwd: .*{message}"):
        OPS.attention_bwd(*{**BACKWARD, **PACKED, name: value}.values())


@pytest.mark.parametrize("name", BACKWARD)
def test_backward_refuses_gradients_of_another_shape(name: str):
    with pytest.raises(RuntimeError, match=rf"attention_bwd: {name} must be f32\[8, ., 16\].*, got f32\[9, 2, 16\]"):
        OPS.attention_bwd(*{**BACKWARD, **PACKED, name: torch.zeros(9, 2, 16)}.values())


@pytest.mark.parametrize(("name", "value", "message"), [
    ("out", torch.zeros(2, 4, 9), r"out must be f32\[2, 4, 8\]"),
    ("q", torch.zeros(2, 4), "q must have 3 dimensions and k_cache 4, got 2 and 4"),
    ("q", torch.zeros(2, 3, 8), "the heads of q must be a multiple of those of k_cache, got 3 and 2"),
    ("k_cache", torch.zeros(2, 3, 8, 8), r"k_cache must be f32\[2, 3, 16, 8\].*, got f32\[2, 3, 8, 8\]"),
    ("v_cache", torch.zeros(2, 4, 16, 8), r"v_cache must be f32\[2, 3, 16, 8\]"),
    ("prefix_table", ZEROS, "prefix_table and own_table must have 2 dimensions, got 1 and 2"),
    ("prefix_table", ZEROS[:1, None].int(), "prefix_table must be i64"),
    ("prefix_lens", ZEROS, r"prefix_lens must be i64\[1\].*, got i64\[2\]"),
    ("prefix_lens", ZEROS[:1] - 1, r"prefix_lens\[0\] must lie in \[0, 16\], got -1"),
    ("prefix_lens", ZEROS[:1] + 17, r"prefix_lens\[0\] must lie in \[0, 16\], got 17"),
    ("prefix_index", ZEROS[:1], r"prefix_index must be i64\[2\]"),
    ("prefix_index", ZEROS + 1, r"prefix_index\[0\] must lie in \[0, 1\), got 1"),
    ("prefix_index", ZEROS - 1, r"prefix_index\[0\] must lie in \[0, 1\), got -1"),
    ("own_table", ZEROS[:, None] + 3, r"own_table\[0, 0\] must lie in \[0, 3\), got 3"),
    ("own_table", ZEROS[:, None] - 1, r"own_table\[0, 0\] must lie in \[0, 3\), got -1"),
    ("own_lens", ZEROS, r"own_lens\[0\] must lie in \[1, 16\], got 0"),
    ("own_lens", ZEROS + 17, r"own_lens\[0\] must lie in \[1, 16\], got 17"),
])
def test_paged_attention_refuses(name: str, value: torch.Tensor, message: str):
    OPS.paged_attention(*PAGED.values())
    with pytest.raises(RuntimeError, match=f"paged_attention: .*{message}"):
        OPS.paged_attention(*{**PAGED, name: value}.values())


def test_table_entries_beyond_the_lengths_are_not_checked():
    table = torch.tensor([[1, -7], [2, 99]])
    OPS.paged_attention(*{**PAGED, "own_table": table, "own_lens": ZEROS + 16}.values())
    with pytest.raises(RuntimeError, match=r"own_table\[0, 1\] must lie in \[0, 3\), got -7"):
        OPS.paged_attention(*{**PAGED, "own_table": table, "own_lens": ZEROS + 17}.values())
