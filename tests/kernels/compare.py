"""Checks for every op: errors no worse than plain torch's in the same dtype, and bits of a row that do not
depend on its batch."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence

import torch

from kernels.triton_ops import IS_INTERPRETED

ROWS = (1, 3, 64, 65) if IS_INTERPRETED else (1, 2, 3, 7, 8, 9, 11, 64, 65, 256)
"""Batches around the sizes where torch's CPU kernels change their code path, and one past each; interpreted kernels have none, and
tiles of 64 rows or more."""
NUM_ROWS = 130 if IS_INTERPRETED else 260
THREADS = (1,) if IS_INTERPRETED else (1, 2)
NUM_NEIGHBOURS = 16
"""An op that errs as plain does, in another order, exceeds 17 such draws once in 18 times, and by more than 1.1 seldom."""

Tensors = torch.Tensor | tuple[torch.Tensor, ...]


def as_tuple(value: Tensors) -> tuple[torch.Tensor, ...]:
    return (value,) if isinstance(value, torch.Tensor) else tuple(value)


def ulp(value: float, dtype: torch.dtype) -> float:
    """The step between neighbours of `dtype` at `value`."""
    return torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(value)) if value else torch.finfo(dtype).tiny


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Compares as integers, so that NaN equals itself and -0 differs from 0."""
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


def largest(x: torch.Tensor) -> float:
    return float(x.abs().max())


def neighbours(inputs: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """NUM_NEIGHBOURS times the inputs, every floating value up to 2**-5 larger: results of the same size, other roundings."""
    generator = torch.Generator().manual_seed(2)
    for _ in range(NUM_NEIGHBOURS):
        yield [(x.double() * (1 + torch.rand(x.shape, generator=generator, dtype=torch.float64) / 32)).to(x.dtype)
               if x.is_floating_point() else x for x in inputs]


def in_float64(inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [x.double() if x.is_floating_point() else x for x in inputs]


def plain_errors(
    plain: Callable[..., Tensors], exact: Callable[..., Tensors], inputs: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Of each output and gradient, in float64."""
    truth = values_and_gradients(exact, in_float64(inputs))
    return [got.double() - want for got, want in zip(values_and_gradients(plain, inputs), truth, strict=True)]


def assert_no_worse_than_plain(
    op: Callable[..., Tensors], plain: Callable[..., Tensors], exact: Callable[..., Tensors], inputs: Sequence[torch.Tensor]
) -> None:
    """Errors against `exact` in float64, compared with those of `plain` in the inputs' own dtype.

    Values: the largest error is at most 1.1 of plain's, plus 2 ulp of the largest value. 1.1 because two correct
    orders of the same sum differ by chance; 2 ulp because plain torch may be exact by luck.
    Gradients are sums over the batch, and the largest of their errors varies by chance. So their root mean square
    is at most 1.1 of plain's, plus 1 ulp of the root mean square value; the largest is at most 4 times plain's,
    plus 2 ulp.

    One run of plain is one sample: over few values its error may be far below its usual one, and only on one CPU.
    So if a limit fails, plain's error is taken as the largest over the inputs and their neighbours. Luck cannot
    lower that, and plain does make that error at these sizes.
    """
    ours, peers = values_and_gradients(op, inputs), values_and_gradients(plain, inputs)
    truth = values_and_gradients(exact, in_float64(inputs))
    num_values = len(ours) - sum(x.is_floating_point() for x in inputs)
    usual = functools.cache(lambda: [plain_errors(plain, exact, near) for near in neighbours(inputs)])
    for number, (got, peer, want) in enumerate(zip(ours, peers, truth, strict=True)):
        assert got.shape == want.shape
        if not want.numel():
            continue
        is_gradient, error, allowed = number >= num_values, got.double() - want, peer.double() - want
        measures = [("largest", largest, 4 if is_gradient else 1.1, 2 * ulp(largest(want), got.dtype))]
        if is_gradient:
            measures.append(("root mean square", root_mean_square, 1.1, ulp(root_mean_square(want), got.dtype)))
        for name, measure, factor, floor in measures:
            limit = factor * measure(allowed) + floor
            if measure(error) > limit:
                limit = factor * max(measure(allowed), *(measure(draw[number]) for draw in usual())) + floor
            assert measure(error) <= limit, f"result {number} (outputs, then gradients): {name} error above {limit:.3g}"


def assert_rows_keep_their_bits(op: Callable[[int, int], Tensors], num_rows: int = NUM_ROWS, rows: Sequence[int] = ROWS) -> None:
    """op(start, end) computes a batch of the rows [start, end) alone; their bits must equal those of the whole batch.

    Windows: at the start, at an odd place and at the end of the batch; with one thread, at the end with two.
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
