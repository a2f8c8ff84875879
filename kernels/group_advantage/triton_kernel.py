"""`group_advantage` on a GPU: a program takes groups of 1024 rewards together, or one larger group in tiles
of 1024.

Statistics are in f64, and their order follows from G alone, so that a group's advantages do not depend on the
rest of the batch. "batch_std" needs the std of the whole batch, hence a launch before: at most 256 programs
each write the count, the mean and the sum of squared deviations of their rewards, and every program of the
main kernel merges these in the same order. Moved: 5 bytes per reward in, 4 out (f32); a group of more than
1024 rewards is read three times, from the caches after the first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.ahead_of_time import Compile, pointer

TILE = 1024
PARTS = 256


@triton.jit
def load_rewards(rewards, mask, b, g, B, G):
    """-> (rewards f64[BLOCK_B, BLOCK_G], 0 where masked, and bool[BLOCK_B, BLOCK_G]: unmasked)"""
    offset = b[:, None] * G + g[None, :]
    takes_part = (b[:, None] < B) & (g[None, :] < G)
    if mask is not None:
        takes_part = tl.load(mask + offset, mask=takes_part, other=0) != 0
    return tl.load(rewards + offset, mask=takes_part, other=0.0).to(tl.float64), takes_part


@triton.jit(do_not_specialize=["B"])
def group_advantage_batch_kernel(
    parts,  # f64[3, programs]: count, mean, and sum of squared deviations from that mean, of the program's tiles
    rewards,  # f32|f64[B, G]
    mask,  # bool[B, G] or None
    B, G, BLOCK_B: tl.constexpr, BLOCK_G: tl.constexpr,
):
    part, num_parts = tl.program_id(0), tl.num_programs(0)
    # First pass: count and mean.
    n, total = tl.zeros((BLOCK_B,), tl.float64), tl.zeros((BLOCK_B,), tl.float64)
    squares = tl.zeros((BLOCK_B,), tl.float64)
    for tile in range(part, tl.cdiv(B, BLOCK_B), num_parts):
        b = tile * BLOCK_B + tl.arange(0, BLOCK_B).to(tl.int64)
        for first in range(0, G, BLOCK_G):
            r, takes_part = load_rewards(rewards, mask, b, first + tl.arange(0, BLOCK_G), B, G)
            n += tl.sum(takes_part.to(tl.float64), 1)
            total += tl.sum(r, 1)
    count = tl.sum(n, 0)
    mean = tl.sum(total, 0) / tl.maximum(count, 1.0)
    # Second pass: squared deviations.
    for tile in range(part, tl.cdiv(B, BLOCK_B), num_parts):
        b = tile * BLOCK_B + tl.arange(0, BLOCK_B).to(tl.int64)
        for first in range(0, G, BLOCK_G):
            r, takes_part = load_rewards(rewards, mask, b, first + tl.arange(0, BLOCK_G), B, G)
            off = tl.where(takes_part, r - mean, 0.0)
            squares += tl.sum(off * off, 1)
    tl.store(parts + part, count)
    tl.store(parts + num_parts + part, mean)
    tl.store(parts + 2 * num_parts + part, tl.sum(squares, 0))


@triton.jit
def batch_std(parts, num_parts, PARTS: tl.constexpr):
    """The std of the whole batch. A part adds its squared deviations from its own mean, and n times the
    squared distance of that mean from the batch's (Chan, Golub and LeVeque 1979)."""
    part = tl.arange(0, PARTS)
    is_there = part < num_parts
    n = tl.load(parts + part, mask=is_there, other=0.0)
    mean = tl.load(parts + num_parts + part, mask=is_there, other=0.0)
    squares = tl.load(parts + 2 * num_parts + part, mask=is_there, other=0.0)
    total = tl.sum(n, 0)
    off = mean - tl.sum(n * mean, 0) / tl.maximum(total, 1.0)
    return tl.sqrt(tl.sum(squares + n * off * off, 0) / tl.maximum(total - 1.0, 1.0))


@triton.jit(do_not_specialize=["B", "num_parts"])
def group_advantage_kernel(
    advantages,  # like rewards
    has_signal,  # bool[B]
    rewards,  # f32|f64[B, G]
    mask,  # bool[B, G] or None
    parts,  # f64[3, num_parts] of group_advantage_batch_kernel, or None
    B, G, num_parts,
    KIND: tl.constexpr, EPS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_G: tl.constexpr, PARTS: tl.constexpr,
):
    # Count, sum and extremes of each group.
    b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    n, total = tl.zeros((BLOCK_B,), tl.float64), tl.zeros((BLOCK_B,), tl.float64)
    highest, lowest = tl.full((BLOCK_B,), float("-inf"), tl.float64), tl.full((BLOCK_B,), float("inf"), tl.float64)
    for first in range(0, G, BLOCK_G):
        r, takes_part = load_rewards(rewards, mask, b, first + tl.arange(0, BLOCK_G), B, G)
        n += tl.sum(takes_part.to(tl.float64), 1)
        total += tl.sum(r, 1)
        highest = tl.maximum(highest, tl.max(tl.where(takes_part, r, float("-inf")), 1))
        lowest = tl.minimum(lowest, tl.min(tl.where(takes_part, r, float("inf")), 1))
    # A group with a NaN or infinite reward has signal, so that its NaN is not hidden: total * 0 is then NaN.
    is_signal = (highest > lowest) | (total * 0.0 != 0.0)

    # The divisor of each kind. EPS is a constexpr because Triton passes a float argument as f32.
    mean, eps = total / tl.maximum(n, 1.0), tl.full((BLOCK_B,), EPS, tl.float64)
    scale = tl.full((BLOCK_B,), 1.0, tl.float64)
    if KIND == "std":
        squares = tl.zeros((BLOCK_B,), tl.float64)
        for first in range(0, G, BLOCK_G):
            r, takes_part = load_rewards(rewards, mask, b, first + tl.arange(0, BLOCK_G), B, G)
            off = tl.where(takes_part, r - mean[:, None], 0.0)
            squares += tl.sum(off * off, 1)
        scale = tl.sqrt(squares / tl.maximum(n - 1.0, 1.0)) + eps
    elif KIND == "leave_one_out":
        scale = tl.maximum(n - 1.0, 1.0) / tl.maximum(n, 1.0)
    elif KIND == "batch_std":
        scale = batch_std(parts, num_parts, PARTS) + eps

    for first in range(0, G, BLOCK_G):
        g = first + tl.arange(0, BLOCK_G)
        r, takes_part = load_rewards(rewards, mask, b, g, B, G)
        # The rounded mean of equal rewards may differ from them, and a small eps would magnify that: zero is
        # set exactly.
        advantage = tl.where(takes_part & is_signal[:, None], (r - mean[:, None]) / scale[:, None], 0.0)
        is_there = (b[:, None] < B) & (g[None, :] < G)
        tl.store(advantages + b[:, None] * G + g[None, :], advantage.to(advantages.dtype.element_ty), mask=is_there)
    tl.store(has_signal + b, is_signal, mask=b < B)


def config(group_size: int) -> dict[str, int]:
    """TILE rewards per program: several whole groups, or one tile of a larger group at a time."""
    block = min(triton.next_power_of_2(group_size), TILE)
    return {"BLOCK_B": TILE // block, "BLOCK_G": block, "num_warps": 4}


def group_advantage(
    advantages: torch.Tensor, has_signal: torch.Tensor, rewards: torch.Tensor, mask: torch.Tensor | None, kind: str, eps: float
) -> None:
    num_groups, group_size = rewards.shape
    chosen = config(group_size)
    num_tiles = triton.cdiv(num_groups, chosen["BLOCK_B"])
    if not num_tiles:
        return
    parts, num_parts = None, min(num_tiles, PARTS)
    if kind == "batch_std":
        parts = rewards.new_empty(3, num_parts, dtype=torch.float64)
        group_advantage_batch_kernel[(num_parts,)](parts, rewards, mask, num_groups, group_size, **chosen)
    group_advantage_kernel[(num_tiles,)](
        advantages, has_signal, rewards, mask, parts, num_groups, group_size, num_parts, KIND=kind, EPS=eps, PARTS=PARTS, **chosen)


def compiles() -> list[Compile]:
    found = []
    inputs = {"rewards": pointer(torch.float32), "mask": "*i1"}
    for kind in ("std", "batch_std"):
        arguments = {"advantages": pointer(torch.float32), "has_signal": "*i1", **inputs,
                     "parts": pointer(torch.float64) if kind == "batch_std" else None, "B": "i32", "G": "i32", "num_parts": "i32"}
        found.append(Compile(f"group_advantage {kind}", torch.float32, group_advantage_kernel, arguments,
                             config(16) | {"KIND": kind, "EPS": 1e-6, "PARTS": PARTS}))
    found.append(Compile("group_advantage_batch", torch.float32, group_advantage_batch_kernel,
                         {"parts": pointer(torch.float64), **inputs, "B": "i32", "G": "i32"}, config(16)))
    return found
