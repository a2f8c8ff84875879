"""The error limits of compare.py: a lucky plain version does not fail an op, a planted error does."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.compare import assert_no_worse_than_plain

F32, BF16 = torch.float32, torch.bfloat16


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x @ weight.T


def draw(size: tuple[int, int, int], dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    m, n, k = size
    return [torch.randn(*shape, generator=generator).to(dtype) for shape in ((m, k), (n, k))]


class LuckyProduct(torch.autograd.Function):
    """Correctly rounded values and gradients for the given inputs, but not for their neighbours."""

    chosen: torch.Tensor

    @staticmethod
    def forward(ctx, x, weight):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight)
        ctx.is_lucky = torch.equal(x, LuckyProduct.chosen)
        return product(x.double(), weight.double()).to(x.dtype) if ctx.is_lucky else product(x, weight)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        if not ctx.is_lucky:
            return dy @ weight, dy.T @ x
        return (dy.double() @ weight.double()).to(x.dtype), (dy.double().T @ x.double()).to(x.dtype)


def in_another_order(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A plain sum term by term: the same number of roundings."""
    total = torch.zeros(x.shape[0], weight.shape[0], dtype=x.dtype)
    for k in reversed(range(x.shape[1])):
        total = total + x[:, k, None] * weight[None, :, k]
    return total


def naive(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    total = torch.zeros(x.shape[0], weight.shape[0], dtype=x.dtype)
    for k in range(x.shape[1]):
        total = total + x[:, k, None] * weight[None, :, k]
    return total


@pytest.mark.parametrize("seed", range(5))
def test_a_lucky_plain_form_fails_no_other_order_of_the_sum(seed: int):
    """1,000 terms: about 10 ulp of error in a chain of f32 sums, which one run of the plain version avoids by luck."""
    inputs = draw((3, 5, 1000), F32, seed)
    LuckyProduct.chosen = inputs[0]

    def plain(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return LuckyProduct.apply(x, weight) if torch.equal(x, inputs[0]) else naive(x, weight)

    assert_no_worse_than_plain(in_another_order, plain, product, inputs)


@pytest.mark.parametrize("is_lucky", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("size", [(1, 3, 8), (17, 96, 128)], ids=str)
def test_a_value_or_gradient_off_by_six_roundings_fails(size: tuple[int, int, int], dtype: torch.dtype, is_lucky: bool):
    inputs = draw(size, dtype)
    LuckyProduct.chosen = inputs[0]
    plain = LuckyProduct.apply if is_lucky else product
    off = 1 + 6 * torch.finfo(dtype).eps
    assert_no_worse_than_plain(product, plain, product, inputs)
    with pytest.raises(AssertionError, match=r"result 0 .* largest error above"):
        assert_no_worse_than_plain(lambda x, w: product(x, w).double().mul(off).to(dtype), plain, product, inputs)
    with pytest.raises(AssertionError, match=r"result 2 .* error above"):
        assert_no_worse_than_plain(
            lambda x, w: product(x, (w - w.detach()) * off + w.detach()), plain, product, inputs)
