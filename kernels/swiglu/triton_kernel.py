"""`swiglu` on a GPU: one pass over memory, one tile of rows and columns per program. The experts' epilogues
use its formulas too.

Bytes moved per element of y: 3 forward, 5 backward, times itemsize. Some ten flops and one exponential per
element leave the kernel bound by memory. A tile has TILE elements, 16 per thread, so two vector loads of each
half are in flight; it is as wide as a row up to WIDEST.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from kernels.ahead_of_time import Compile, pointer
from kernels.triton_math import rounded
from kernels.triton_ops import DTYPES

TILE, WIDEST = 2048, 1024


@triton.jit
def swiglu_value(gate, up):
    """silu(gate) * up in f32. e^-gate is capped at e^80, where silu vanishes: inf * 0 would put NaN in the
    gradient."""
    return gate / (1.0 + tl.exp(tl.minimum(-gate, 80.0, propagate_nan=tl.PropagateNan.ALL))) * up


@triton.jit
def swiglu_gradient(gate, up, dy):
    """-> dgate, dup. silu' = s * (1 + gate * (1 - s)) with s = sigmoid(gate), and 1 - s = e^-gate * s."""
    e = tl.exp(tl.minimum(-gate, 80.0, propagate_nan=tl.PropagateNan.ALL))
    sigmoid = 1.0 / (1.0 + e)
    return dy * up * (sigmoid * (1.0 + gate * (e * sigmoid))), dy * (gate * sigmoid)


@triton.jit(do_not_specialize=["T"])
def swiglu_fwd_kernel(
    y,  # [T, INNER]
    gate_up,  # [T, 2 * INNER]
    T, INNER, BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr,
):
    t = (tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]
    i = (tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I))[None, :]
    mask = (t < T) & (i < INNER)
    gate = tl.load(gate_up + t * 2 * INNER + i, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + t * 2 * INNER + INNER + i, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + t * INNER + i, rounded(swiglu_value(gate, up), y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T"])
def swiglu_bwd_kernel(
    dgate_up,  # [T, 2 * INNER]
    dy,  # [T, INNER]
    gate_up,  # [T, 2 * INNER]
    T, INNER, BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr,
):
    t = (tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]
    i = (tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I))[None, :]
    mask = (t < T) & (i < INNER)
    place = t * 2 * INNER + i
    gate = tl.load(gate_up + place, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + place + INNER, mask=mask, other=0.0).to(tl.float32)
    dgate, dup = swiglu_gradient(gate, up, tl.load(dy + t * INNER + i, mask=mask, other=0.0).to(tl.float32))
    tl.store(dgate_up + place, rounded(dgate, dgate_up.dtype.element_ty), mask=mask)
    tl.store(dgate_up + place + INNER, rounded(dup, dgate_up.dtype.element_ty), mask=mask)


def config(inner_size: int) -> dict[str, int]:
    """The tile of a program, from the width of a row alone."""
    width = min(triton.next_power_of_2(inner_size), WIDEST)
    return {"BLOCK_T": TILE // width, "BLOCK_I": width, "num_warps": 4}


def _launch(kernel: Any, y: torch.Tensor, *tensors: torch.Tensor) -> None:
    """y: any tensor of shape [T, I]; it gives the sizes."""
    num_tokens, inner_size = y.shape
    if not y.numel():
        return
    chosen = config(inner_size)
    grid = (triton.cdiv(num_tokens, chosen["BLOCK_T"]), triton.cdiv(inner_size, chosen["BLOCK_I"]))
    kernel[grid](*tensors, num_tokens, inner_size, **chosen)


def swiglu_fwd(y: torch.Tensor, gate_up: torch.Tensor) -> None:
    _launch(swiglu_fwd_kernel, y, y, gate_up)


def swiglu_bwd(dgate_up: torch.Tensor, dy: torch.Tensor, gate_up: torch.Tensor) -> None:
    _launch(swiglu_bwd_kernel, dy, dgate_up, dy, gate_up)


def compiles() -> list[Compile]:
    found = []
    for dtype in DTYPES:
        p = pointer(dtype)
        for size in (96, 768):  # an expert of the default model, and of a large one
            sizes, options = {"T": "i32", "INNER": "i32"}, config(size) | {"num_stages": 3}
            found.append(Compile(f"swiglu_fwd I{size}", dtype, swiglu_fwd_kernel, {"y": p, "gate_up": p} | sizes, options))
            found.append(Compile(f"swiglu_bwd I{size}", dtype, swiglu_bwd_kernel, {"dgate_up": p, "dy": p, "gate_up": p} | sizes,
                                 options))
    return found
