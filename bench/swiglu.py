"""`swiglu` (kernels/swiglu/) against torch's silu and Liger's; memory-bound."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bench.cases import Case, Setup, Side
from bench.peers.ops import liger_swiglu
from bench.suite import main
from kernels.swiglu import make_inputs, swiglu
from kernels.swiglu.reference import swiglu_reference

BF16, F32 = torch.bfloat16, torch.float32
SHAPES = {"numbers": [((8192, 14336), BF16)], "small": [((4096, 96), BF16), ((4096, 96), F32)], "tiny": [((5, 7), F32)]}
"""(T, I)"""


def by_torch(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def cases(setup: Setup) -> list[Case]:
    found = []
    for (t, i), dtype in setup.pick(SHAPES):
        num_bytes = dtype.itemsize * t * i
        found.append(Case(
            op="swiglu", shape=f"T{t} I{i}", dtype=dtype, wanted=("gate_up",), exact=swiglu_reference,
            make=lambda sizes=(t, i), dtype=dtype: make_inputs(*sizes, dtype, str(setup.device)),
            sides={**setup.ours("swiglu", swiglu, dtype), "F.silu": Side(by_torch), **setup.compiled(swiglu_reference),
                   "liger-kernel": liger_swiglu(setup.device)},
            work={"forward": (0, 3 * num_bytes), "backward": (0, 5 * num_bytes)}))
    return found


if __name__ == "__main__":
    main("swiglu", cases)
