"""`group_advantage` on a GPU: a program takes as many groups as make 1024 rewards, or one larger group piece by piece.

Statistics are in f64 and in an order that follows from G alone, so that a group's advantages do not depend on the groups beside it.
"batch_std", which is the batch's, takes a launch before: at most 256 programs each give count, mean and sum of squares about it of
their rewards; every program of the main kernel merges these, in the same order.
Moved: 5 bytes a reward in, 4 out (f32); a group beyond 1024 rewards is read three times, from the caches after the first.
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
    """-> (f64[BLOCK_B, BLOCK_G], 0 where masked, and whether it takes part)"""
    where = b[:, None] * G + g[None, :]
    is_there = (b[:, None] < B) & (g[None, :] < G)
    takes_part = tl.load(mask + where, mask=is_there, other=0) != 0
    return tl.load(rewards + where, mask=takes_part, other=0.0).to(tl.float64), takes_part


@triton.jit(do_not_specialize=["B"])
def group_advantage_batch_kernel(parts, rewards, mask, B, G, BLOCK_B: tl.constexpr, BLOCK_G: tl.constexpr):
    """parts f64[3, programs]: of this program's tiles the count, the mean, and the sum of squares about that mean."""
    part, num_parts = tl.program_id(0), tl.num_programs(0)
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
    """Of the whole batch: squares about a part's own mean, and what that mean is off the batch's (Chan, Golub and LeVeque 1979)."""
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
    advantages, has_signal, rewards, mask, parts, B, G, num_parts,
    KIND: tl.constexpr, EPS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_G: tl.constexpr, PARTS: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    n, total = tl.zeros((BLOCK_B,), tl.float64), tl.zeros((BLOCK_B,), tl.float64)
    highest, lowest = tl.full((BLOCK_B,), float("-inf"), tl.float64), tl.full((BLOCK_B,), float("inf"), tl.float64)
    for first in range(0, G, BLOCK_G):
        r, takes_part = load_rewards(rewards, mask, b, first + tl.arange(0, BLOCK_G), B, G)
        n += tl.sum(takes_part.to(tl.float64), 1)
        total += tl.sum(r, 1)
        highest = tl.maximum(highest, tl.max(tl.where(takes_part, r, float("-inf")), 1))
        lowest = tl.minimum(lowest, tl.min(tl.where(takes_part, r, float("inf")), 1))
    is_signal = highest > lowest
    mean, eps = total / tl.maximum(n, 1.0), tl.full((BLOCK_B,), EPS, tl.float64)  # as an argument it would be an f32
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
        # The mean of equal rewards may be rounded off them, which an eps near it would blow up: hence the exact zero.
        advantage = tl.where(takes_part & is_signal[:, None], (r - mean[:, None]) / scale[:, None], 0.0)
        is_there = (b[:, None] < B) & (g[None, :] < G)
        tl.store(advantages + b[:, None] * G + g[None, :], advantage.to(advantages.dtype.element_ty), mask=is_there)
    tl.store(has_signal + b, is_signal, mask=b < B)


def config(group_size: int) -> dict[str, int]:
    """TILE rewards a program, or as many of one group's as a program holds at a time."""
    block = min(triton.next_power_of_2(group_size), TILE)
    return {"BLOCK_B": TILE // block, "BLOCK_G": block, "num_warps": 4}


def group_advantage(
    advantages: torch.Tensor, has_signal: torch.Tensor, rewards: torch.Tensor, mask: torch.Tensor, kind: str, eps: float
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
