"""Every Triton kernel compiles for sm_80, sm_90 and sm_100 without a GPU, with the instructions and within the limits it should."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from kernels.ahead_of_time import SHARED_LIMIT, build_for, compile_for, compiles_of, ops_with_triton
from kernels.checks import SHORT
from kernels.triton_ops import IS_INTERPRETED

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(IS_INTERPRETED, reason="a kernel for the interpreter cannot be compiled")
RECORD = json.loads((Path(__file__).resolve().parents[2] / "bench/results/triton_resources.json").read_text())["kernels"]


@pytest.mark.parametrize("op", ops_with_triton())
def test_a_kernel_keeps_within_its_resources_on_every_architecture(op: str):
    for what in compiles_of(op):
        for capability, shared_limit in SHARED_LIMIT.items():
            name = f"{what.name} {SHORT[what.dtype]} sm_{capability}"
            found = compile_for(what, capability)
            assert found.shared_bytes <= shared_limit, name
            assert found.spill_bytes <= (RECORD[name]["spill_bytes"] if what.may_spill else 0), name
            if what.is_matrix_product and what.dtype == torch.bfloat16:
                assert found.matrix_instructions > 0, f"{name}: no matrix instruction of its own"
                assert found.async_copies > 0, f"{name}: operands arrive by plain loads"


def test_the_record_lists_the_kernels_that_there_are():
    """`python -m bench.resources --json bench/results/triton_resources.json` writes it."""
    forms = [what for op in ops_with_triton() for what in compiles_of(op)]
    assert set(RECORD) == {f"{what.name} {SHORT[what.dtype]} sm_{capability}" for what in forms for capability in SHARED_LIMIT}


def columns_of_a_row(ttgir: str) -> set[tuple[str, ...]]:
    """How the sums along rows lay a row's columns over threads: what of their layouts counts columns."""
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", ttgir, re.M))
    reduced = re.findall(r'"tt\.reduce"\(.*?\}\) : \(tensor<\w+, (#\w+)>', ttgir, re.S)
    assert reduced
    return {tuple(re.findall(r"instrShape = \[.*?\]|(?<=, )\d+(?=\])|order = \[.*?\]", layouts[name])) for name in reduced}


@pytest.mark.parametrize(("head_dim", "dtype"), [(128, torch.bfloat16), (32, torch.bfloat16), (32, torch.float32)], ids=str)
def test_a_row_is_summed_over_the_same_threads_packed_and_paged(head_dim: int, dtype: torch.dtype):
    """Else decoding leaves training's bits: on sm_90 their tiles have other heights, and Triton lays each kernel out by itself."""
    from kernels.attention.triton_kernel import forms

    kernels = [what for what in forms(head_dim, dtype, 4) if "bwd" not in what.name]
    packed, prefix, own = (columns_of_a_row(build_for(what, 90)[0].asm["ttgir"]) for what in kernels)
    assert packed == prefix == own and len(packed) == 1
