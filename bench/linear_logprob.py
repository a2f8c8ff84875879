"""`linear_logprob` (kernels/linear_logprob/) against cross-entropies of torch, Liger and Apple.

`percent` of backward counts 4NDV FLOPs, as if the softmax was saved; recomputing the logits takes 6NDV.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bench.cases import Case, Setup, Side
from bench.peers.ops import cut_cross_entropy, liger_cross_entropy
from bench.suite import main
from kernels.linear_logprob import linear_logprob, make_inputs
from kernels.linear_logprob.reference import linear_logprob_reference

BF16, F32 = torch.bfloat16, torch.float32
SHAPES = {"numbers": [((8192, 4096, 131072), BF16), ((4096, 1024, 151936), BF16)],
          "small": [((4096, 128, 64), BF16), ((4096, 128, 64), F32)],
          "tiny": [((9, 12, 33), F32)]}
"""(N, D, V)"""
MOST_CHECKED = 512
"""Most rows for the error: float64 logits of all rows would take gigabytes."""


def by_reference(hidden: torch.Tensor, weight: torch.Tensor, target_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return linear_logprob_reference(hidden, weight, target_ids, 1.0)


def by_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, target_ids: torch.Tensor) -> torch.Tensor:
    """The logits are rounded to hidden's dtype; the cross-entropy is in f32."""
    return -F.cross_entropy(F.linear(hidden, weight).float(), target_ids, reduction="none")


def by_linear_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, target_ids: torch.Tensor) -> torch.Tensor:
    return -F.linear_cross_entropy(hidden, weight, target_ids, reduction="none")


def torchs() -> dict[str, Side | str]:
    name = "F.linear_cross_entropy"
    found: dict[str, Side | str] = {"F.cross_entropy": Side(by_cross_entropy)}
    return found | {name: Side(by_linear_cross_entropy) if hasattr(F, "linear_cross_entropy") else "not in this torch"}


def cases(setup: Setup) -> list[Case]:
    found = []
    for (n, d, v), dtype in setup.pick(SHAPES):
        num_bytes = dtype.itemsize * (n * d + v * d)

        def make(n: int = n, d: int = d, v: int = v, dtype: torch.dtype = dtype) -> dict[str, torch.Tensor]:
            return make_inputs(n, d, v, dtype, str(setup.device))
        found.append(Case(
            op="linear_logprob", shape=f"N{n} D{d} V{v}", dtype=dtype, wanted=("hidden", "weight"), exact=by_reference, make=make,
            check=lambda n=n, make=make: make(min(n, MOST_CHECKED)),
            sides={**setup.ours("linear_logprob", linear_logprob, dtype), **torchs(), **setup.compiled(by_reference),
                   "liger-kernel": liger_cross_entropy(setup.device), "cut-cross-entropy": cut_cross_entropy(setup.device)},
            work={"forward": (2 * n * d * v, num_bytes), "backward": (4 * n * d * v, 2 * num_bytes)}))
    return found


if __name__ == "__main__":
    main("linear_logprob", cases)
