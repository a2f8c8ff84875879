"""`linear` (kernels/linear/) against torch's GEMM, on shapes of training, decode and routers."""

from __future__ import annotations

import torch

from bench.cases import Case, Setup
from bench.suite import main
from kernels.linear import linear, make_inputs
from kernels.linear.reference import linear_reference

BF16, F32 = torch.bfloat16, torch.float32
SHAPES = {"numbers": [((8192, 4096, 4096), BF16), ((64, 4096, 4096), BF16), ((8192, 128, 2048), F32)],
          "small": [((4096, 256, 128), BF16), ((256, 256, 128), BF16), ((4096, 256, 128), F32)],
          "tiny": [((17, 8, 12), F32)]}
"""(M, N, K)"""


def cases(setup: Setup) -> list[Case]:
    found = []
    for (m, n, k), dtype in setup.pick(SHAPES):
        num_bytes = dtype.itemsize * (m * k + n * k + m * n)
        found.append(Case(
            op="linear", shape=f"M{m} N{n} K{k}", dtype=dtype, wanted=("x", "weight"), exact=linear_reference,
            make=lambda sizes=(m, n, k), dtype=dtype: make_inputs(*sizes, dtype, str(setup.device)),
            sides={**setup.ours("linear", linear, dtype), **setup.compiled(linear_reference)},
            work={"forward": (2 * m * n * k, num_bytes), "backward": (4 * m * n * k, 2 * num_bytes)}))
    return found


if __name__ == "__main__":
    main("linear", cases)
