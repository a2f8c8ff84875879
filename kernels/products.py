"""Matrix products of the reference ops. A row keeps its bits in any batch, because every call of torch's GEMM has
the same shape and one thread.

torch's GEMM chooses its code path, and with it the order of the sum over K, by the number of rows and threads; the
rules differ between CPUs. So rows are computed in blocks of a fixed number, the last block padded with zeros. A row
must then have the same bits at every place of its block. torch does not promise this. It was observed with torch
2.13 on an Intel CPU with AMX (tests/kernels/test_linear.py checks it): in f32 for blocks of 16 and 64 rows, also with
MKL_CBWR=AVX2; in bf16 for the same blocks, also with ONEDNN_MAX_CPU_ISA=AVX2. With MKL_CBWR=AVX2, blocks of 8, 12, 32
and 128 rows fail in f32; with MKL_CBWR=SSE4_2, every block size fails for narrow N.

Only forward products are computed in blocks. A gradient is one plain product.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

LINEAR_ROWS = 64
"""Rows per call of `linear`. A bf16 call of oneDNN takes at least 13 us: 1,024 rows by [256, 128] take 1.7 ms in
blocks of 16 and 0.5 ms in blocks of 64 (Intel Xeon with AMX, one thread)."""
BATCH_ROWS = 16
"""Rows per matrix of a batched product, for attention: a decoded token has few query heads per kv head."""

# Ops, so that torch.compile does not look inside: it cannot trace a change of the number of threads.
_LIBRARY = torch.library.Library("reason_rl_reference", "DEF")
_OPS: Any = torch.ops.reason_rl_reference


@contextmanager
def _one_thread() -> Iterator[None]:
    """With more threads, each sums a range of K, and the order of the sum changes."""
    threads = torch.get_num_threads()
    if threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _linear_fwd(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    """y [M, N] = x [M, K] @ weight [N, K]^T"""
    num_rows = x.shape[0]
    whole = num_rows - num_rows % LINEAR_ROWS
    with _one_thread():
        for first in range(0, whole, LINEAR_ROWS):
            y[first : first + LINEAR_ROWS] = torch.mm(x[first : first + LINEAR_ROWS], weight.T)
        if whole < num_rows:
            last = F.pad(x[whole:], (0, 0, 0, LINEAR_ROWS + whole - num_rows))
            y[whole:] = torch.mm(last, weight.T)[: num_rows - whole]


def _batch_fwd(y: torch.Tensor, rows: torch.Tensor, matrix: torch.Tensor) -> None:
    """y [B, BATCH_ROWS, N] = rows [B, BATCH_ROWS, K] @ matrix [B, K, N]"""
    with _one_thread():
        torch.bmm(rows, matrix, out=y)


for _name, _schema, _run in (("linear_fwd", "(Tensor(a!) y, Tensor x, Tensor weight) -> ()", _linear_fwd),
                             ("batch_fwd", "(Tensor(a!) y, Tensor rows, Tensor matrix) -> ()", _batch_fwd)):
    _LIBRARY.define(_name + _schema)
    _LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"reason_rl_reference::{_name}", lambda *args: None, lib=_LIBRARY)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        x, weight = x.contiguous(), weight.contiguous()  # a transposed operand would be another call
        ctx.save_for_backward(x, weight)
        y = x.new_empty(x.shape[0], weight.shape[0])
        _OPS.linear_fwd(y, x, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        (x, weight), (dy,) = ctx.saved_tensors, grads
        return (torch.mm(dy, weight) if ctx.needs_input_grad[0] else None,
                torch.mm(dy.T, x) if ctx.needs_input_grad[1] else None)


class _Batch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        rows, matrix = rows.contiguous(), matrix.contiguous()
        ctx.save_for_backward(rows, matrix)
        y = rows.new_empty(*rows.shape[:2], matrix.shape[2])
        _OPS.batch_fwd(y, rows, matrix)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        (rows, matrix), (dy,) = ctx.saved_tensors, grads
        return (torch.bmm(dy, matrix.transpose(1, 2)) if ctx.needs_input_grad[0] else None,
                torch.bmm(rows.transpose(1, 2), dy) if ctx.needs_input_grad[1] else None)


def linear_in_blocks(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [M, K] @ weight [N, K]^T -> [M, N]; a row's bits depend on the row, the weight and nothing else."""
    y: torch.Tensor = _Linear.apply(x, weight)
    return y


def batch_in_blocks(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """f32|f64 rows [..., M, K] @ matrix [..., K, N] -> [..., M, N]; a row's bits depend on it and its matrix alone, for N > 1."""
    *batch, num_rows, inner = rows.shape
    num_blocks = -(-num_rows // BATCH_ROWS)
    blocks = F.pad(rows, (0, 0, 0, num_blocks * BATCH_ROWS - num_rows)).reshape(-1, BATCH_ROWS, inner)
    matrices = matrix.unsqueeze(-3).expand(*batch, num_blocks, *matrix.shape[-2:]).reshape(-1, *matrix.shape[-2:])
    y: torch.Tensor = _Batch.apply(blocks, matrices)
    return y.view(*batch, num_blocks * BATCH_ROWS, -1)[..., :num_rows, :]
