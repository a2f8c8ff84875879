"""`group_advantage` (kernels/group_advantage/): one launch per step on a GPU."""

from __future__ import annotations

import functools

import torch

from bench.cases import Case, Setup
from bench.suite import main
from kernels.group_advantage import group_advantage, make_inputs

SHAPES = {"numbers": ["large"], "small": ["right_or_wrong"], "tiny": ["odd_group"]}


def cases(setup: Setup) -> list[Case]:
    found, by_reference = [], functools.partial(group_advantage, impl="reference")
    for name in setup.pick(SHAPES):
        b, g = make_inputs()[name]["rewards"].shape
        found.append(Case(
            op="group_advantage", shape=f"B{b} G{g}", dtype=torch.float32, exact=by_reference,
            make=lambda name=name: make_inputs(setup.device)[name],
            sides={**setup.ours("group_advantage", group_advantage, torch.float32), **setup.compiled(by_reference)},
            work={"forward": (0, 9 * b * g + b)}))
    return found


if __name__ == "__main__":
    main("group_advantage", cases)
