"""`rope` (kernels/rope/); memory-bound."""

from __future__ import annotations

import torch

from bench.cases import Case, Setup
from bench.suite import main
from kernels.rope import make_inputs, rope
from kernels.rope.reference import rope_reference

BF16, F32 = torch.bfloat16, torch.float32
SHAPES = {"numbers": [((8192, 32, 128), BF16)], "small": [((4096, 4, 32), BF16), ((4096, 4, 32), F32)], "tiny": [((5, 2, 6), F32)]}
"""(T, H, C)"""


def cases(setup: Setup) -> list[Case]:
    found = []
    for (t, h, c), dtype in setup.pick(SHAPES):
        num_bytes = 2 * dtype.itemsize * t * h * c + 4 * t * c
        found.append(Case(
            op="rope", shape=f"T{t} H{h} C{c}", dtype=dtype, wanted=("x",), exact=rope_reference,
            make=lambda sizes=(t, h, c), dtype=dtype: make_inputs(*sizes, dtype, str(setup.device)),
            sides={**setup.ours("rope", rope, dtype), **setup.compiled(rope_reference)},
            work={"forward": (0, num_bytes), "backward": (0, num_bytes)}))
    return found


if __name__ == "__main__":
    main("rope", cases)
