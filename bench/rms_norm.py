"""`rms_norm` and `add_rms_norm` (kernels/rms_norm/) against torch's and Liger's; memory-bound."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from bench.cases import Case, Inputs, Setup, Side
from bench.peers.ops import liger_rms_norm
from bench.suite import main
from kernels.rms_norm import add_rms_norm, make_inputs, rms_norm
from kernels.rms_norm.reference import rms_norm_reference

EPS = 1e-6
SHAPES = {"numbers": [((8192, 4096), torch.bfloat16)],
          "small": [((4096, 128), torch.bfloat16), ((4096, 4, 32), torch.bfloat16), ((4096, 128), torch.float32)],
          "tiny": [((3, 33), torch.float32)]}
"""small: the default model's residual stream, and the heads of its q."""


def by_reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return rms_norm_reference(x, weight, EPS)


def by_torch(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), EPS)


def normed_sum(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, impl: str) -> tuple[torch.Tensor, torch.Tensor]:
    return add_rms_norm(x, residual, weight, EPS, impl)


def sum_case(setup: Setup, shape: tuple[int, ...], dtype: torch.dtype) -> Case:
    num_bytes = dtype.itemsize * torch.Size(shape).numel()

    def make() -> Inputs:
        inputs = make_inputs(shape, dtype, str(setup.device))
        return inputs | {"residual": inputs["x"].flip(0).contiguous()}
    by_reference = functools.partial(normed_sum, impl="reference")
    return Case(
        op="add_rms_norm", shape="x".join(map(str, shape)), dtype=dtype, wanted=("x", "residual", "weight"), exact=by_reference,
        make=make, sides={**setup.ours("add_rms_norm", normed_sum, dtype), **setup.compiled(by_reference)},
        work={"forward": (0, 4 * num_bytes), "backward": (0, 3 * num_bytes)})


def cases(setup: Setup) -> list[Case]:
    found = []
    for shape, dtype in setup.pick(SHAPES):
        num_bytes = dtype.itemsize * torch.Size(shape).numel()
        found.append(Case(
            op="rms_norm", shape="x".join(map(str, shape)), dtype=dtype, wanted=("x", "weight"), exact=by_reference,
            make=lambda shape=shape, dtype=dtype: make_inputs(shape, dtype, str(setup.device)),
            sides={**setup.ours("rms_norm", rms_norm, dtype), "F.rms_norm": Side(by_torch), **setup.compiled(by_reference),
                   "liger-kernel": liger_rms_norm(setup.device, EPS)},
            work={"forward": (0, 2 * num_bytes), "backward": (0, 3 * num_bytes)}))
    return [*found, sum_case(setup, *setup.pick(SHAPES)[0])]


if __name__ == "__main__":
    main("rms_norm", cases)
