"""Shared by the tests of attention: packs of many sizes, and two plain implementations of packed attention.

Triton's interpreter gets fewer and smaller sizes: one program there takes as long as a whole segment elsewhere.
"""

from __future__ import annotations

import torch

from kernels.triton_ops import IS_INTERPRETED

F32, BF16 = torch.float32, torch.bfloat16
Segment = tuple[int, int, int, int]
HEADS = [(4, 2, 32), (3, 1, 20)] if IS_INTERPRETED else [(1, 1, 8), (4, 2, 32), (6, 2, 16), (8, 1, 64), (2, 2, 12), (2, 1, 128)]
"""(H, K, C)"""
# bf16 has the same f32 sums, rounded at the end: one shape is enough.
HEADS_AND_DTYPES = [(heads, F32) for heads in HEADS] + [((4, 2, 32), BF16)]


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


# Lengths about a block (16), a query step (32) and a key tile (64, 128), prefixes shorter and longer than each.
GROUPS = [(6, [47, 3]), (67, [70]), (15, [])] if IS_INTERPRETED else [
    (1, [3, 1]), (6, [47, 20]), (47, [123, 3]), (123, [1, 47]), (16, [128, 112, 113]), (130, [33, 1]), (15, []), (17, [64])]
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
