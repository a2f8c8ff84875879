"""`sample` (kernels/sample/) from last hidden states, without truncation and with top-k and top-p.

`error` is the share of rows whose token differs from the one that float64 draws with the same noise.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from bench.cases import Case, Setup
from bench.suite import main
from kernels.sample import make_inputs, sample

BF16, F32 = torch.bfloat16, torch.float32
PLAIN: dict[str, float] = {}
CUT = {"top_k": 50, "top_p": 0.95}
SHAPES = {"numbers": [((256, 4096, 131072), BF16, PLAIN), ((256, 4096, 131072), BF16, CUT), ((64, 4096, 131072), BF16, PLAIN)],
          "small": [((256, 128, 64), BF16, PLAIN), ((256, 128, 64), BF16, CUT), ((256, 128, 64), F32, PLAIN)],
          "tiny": [((3, 12, 33), F32, PLAIN), ((3, 12, 33), F32, CUT)]}
"""(rows, D, V), dtype, truncation"""


def token_alone(impl: str, options: dict[str, Any], **inputs: torch.Tensor) -> torch.Tensor:
    return sample(**inputs, **options, impl=impl)[0]


def cases(setup: Setup) -> list[Case]:
    found = []
    for (r, d, v), dtype, options in setup.pick(SHAPES):
        call = functools.partial(token_alone, options=options)
        kind = ", ".join(f"{name} {value}" for name, value in options.items()) or "all tokens"
        found.append(Case(
            op="sample", shape=f"R{r} D{d} V{v}, {kind}", dtype=dtype, exact=functools.partial(call, impl="reference"),
            make=lambda sizes=(r, d, v), dtype=dtype: make_inputs(*sizes, dtype, str(setup.device)),
            sides={**setup.ours("sample", call, dtype), **setup.compiled(functools.partial(call, impl="reference"))},
            work={"forward": (2 * r * d * v, dtype.itemsize * (v * d + r * d))}))
    return found


if __name__ == "__main__":
    main("sample", cases)
