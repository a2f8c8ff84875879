"""What every op is held to: errors no worse than plain torch's in the same dtype, and rows that keep their bits in any batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from kernels.triton_ops import IS_INTERPRETED

ROWS = (1, 3, 64, 65) if IS_INTERPRETED else (1, 2, 3, 7, 8, 9, 11, 64, 65, 256)
"""Batches around the sizes where torch's CPU kernels change their code path, and one past each; interpreted kernels have none, and
tiles of 64 rows or more."""
NUM_ROWS = 130 if IS_INTERPRETED else 260
THREADS = (1,) if IS_INTERPRETED else (1, 2)

Tensors = torch.Tensor | tuple[torch.Tensor, ...]


def as_tuple(value: Tensors) -> tuple[torch.Tensor, ...]:
    return (value,) if isinstance(value, torch.Tensor) else tuple(value)


def ulp(value: float, dtype: torch.dtype) -> float:
    """The step between neighbours of `dtype` at `value`."""
    return torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(value)) if value else torch.finfo(dtype).tiny


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Compared as integers, so that NaN equals itself and -0 is not 0."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(integers), b.contiguous().view(integers))


def values_and_gradients(op: Callable[..., Tensors], inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Outputs, then the gradient of every floating input, for one upstream gradient that is exact in every dtype."""
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    outputs = as_tuple(op(*leaves))
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(out.shape, generator=generator).bfloat16().to(out.dtype) for out in outputs]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    gradients = torch.autograd.grad(outputs, wanted, upstream, allow_unused=True, materialize_grads=True)
    return [out.detach() for out in outputs] + list(gradients)


def root_mean_square(x: torch.Tensor) -> float:
    return float(x.pow(2).mean().sqrt())


def assert_no_worse_than_plain(
    op: Callable[..., Tensors], plain: Callable[..., Tensors], exact: Callable[..., Tensors], inputs: Sequence[torch.Tensor]
) -> None:
    """Errors against `exact` in float64, beside those of `plain` in the inputs' own dtype.

    Values: the largest error is at most 1.1 of plain's, plus 2 ulp of the largest value. 1.1 because two right orders of the
    same sum differ by chance; 2 ulp because plain torch may be exact by luck.
    Gradients are sums over the batch, and the largest of their errors is itself chance: so their root mean square is held to
    1.1 of plain's, plus 1 ulp of the root mean square value, and the largest to 4 times plain's, plus 2 ulp.
    """
    ours, theirs = values_and_gradients(op, inputs), values_and_gradients(plain, inputs)
    truth = values_and_gradients(exact, [x.double() if x.is_floating_point() else x for x in inputs])
    num_gradients = sum(x.is_floating_point() for x in inputs)
    for number, (got, peer, want) in enumerate(zip(ours, theirs, truth, strict=True)):
        assert got.shape == want.shape
        if not want.numel():
            continue
        is_gradient = number >= len(ours) - num_gradients
        error, allowed = got.double() - want, peer.double() - want
        limit = (4 if is_gradient else 1.1) * float(allowed.abs().max()) + 2 * ulp(float(want.abs().max()), got.dtype)
        assert float(error.abs().max()) <= limit, f"result {number} (outputs, then gradients): largest error above {limit:.3g}"
        if is_gradient:
            limit = 1.1 * root_mean_square(allowed) + ulp(root_mean_square(want), got.dtype)
            assert root_mean_square(error) <= limit, f"result {number}: root mean square error above {limit:.3g}"


def assert_rows_keep_their_bits(op: Callable[[int, int], Tensors], num_rows: int = NUM_ROWS, rows: Sequence[int] = ROWS) -> None:
    """op(start, end) gives the rows [start, end) of a batch that holds nothing else: the bits are those of the whole batch.

    Windows at the front, at an odd place and at the very end of the batch; one thread, and at the end two.
    """
    torch.set_num_threads(1)
    whole = as_tuple(op(0, num_rows))
    for threads in THREADS:
        torch.set_num_threads(threads)
        for count in (*rows, num_rows):
            last = num_rows - count
            for start in sorted({0, min(5, last), last}) if threads == 1 else [last]:
                for got, want in zip(as_tuple(op(start, start + count)), whole, strict=True):
                    assert same_bits(got, want[start : start + count]), f"rows {start}..{start + count}, {threads} threads"
