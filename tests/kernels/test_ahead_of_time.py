"""Every Triton kernel compiles for sm_80, sm_90 and sm_100 without a GPU, with the expected instructions and
within its resource limits."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

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
                assert found.matrix_instructions > 0, f"{name}: no matrix instruction"
                assert found.async_copies > 0, f"{name}: operands are loaded by plain loads"


def test_the_record_lists_the_kernels_that_there_are():
    """`python -m bench.resources --json bench/results/triton_resources.json` writes it."""
    forms = [what for op in ops_with_triton() for what in compiles_of(op)]
    assert set(RECORD) == {f"{what.name} {SHORT[what.dtype]} sm_{capability}" for what in forms for capability in SHARED_LIMIT}


class Recorder:
    """Replaces a kernel and records its keyword arguments at launch."""

    options: dict[str, Any]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **options: setattr(self, "options", options)


def layouts_of_sums(op: str, name: str, options: dict[str, Any], shape: str) -> set[str]:
    """The thread layouts of the tensors that `op`'s f32 kernel `name` reduces ("128x16xf32"): they fix the order
    of its sums."""
    what = next(what for what in compiles_of(op) if (what.name, what.dtype) == (name, torch.float32))
    code = build_for(replace(what, options=options), 90)[0].asm["ttgir"]
    named = dict(re.findall(r"^(#\w+) = (.*)$", code, re.MULTILINE))
    found = re.findall(rf"\}}\) : \(tensor<{shape}, (#\w+)>\) -> tensor", code)
    assert found, f"{name} reduces no {shape}"
    return {named[layout] for layout in found}


def test_the_samplers_sums_run_in_the_order_of_the_trainers(monkeypatch: pytest.MonkeyPatch):
    """Otherwise their logprobs would differ in the last bits. The interpreter has no threads, so it cannot check this."""
    from kernels.linear_logprob import triton_kernel as trainer
    from kernels.sample import triton_kernel as sampler

    forms = {"sample_head": ("sample", "sample_draw V64"), "linear_logprob_fwd": ("linear_logprob", "linear_logprob_fwd 128x64"),
             "sample_merge": ("sample", "sample_merge"), "linear_logprob_merge": ("linear_logprob", "linear_logprob_merge 1x2048")}
    for num_chunks in (1, 10):
        used = {name: Recorder() for name in forms}
        with monkeypatch.context() as patched:
            for name, recorder in used.items():
                patched.setattr(sampler if name.startswith("sample") else trainer, f"{name}_kernel", recorder)
            ids, column, empty = torch.zeros(3, dtype=torch.int64), torch.zeros(3), torch.zeros(0, 0)
            hidden, weight = torch.zeros(3, 16), torch.zeros(64 * num_chunks, 16)
            sampler.draw_rows(ids, column, column, hidden, weight, ids, ids, 1.0, None)
            trainer.linear_logprob_fwd(column, column, column, empty, empty, hidden, weight, ids, 1.0)
        merged = used["linear_logprob_merge"].options
        shapes = {"merge": f"{merged['CHUNKS']}x{merged['ROWS']}xf64"} | ({"head": "128x16xf32"} if num_chunks == 1 else {})
        for part, shape in shapes.items():  # of the head, quarters of a tile
            names = f"sample_{part}", "linear_logprob_fwd" if part == "head" else "linear_logprob_merge"
            ours, theirs = (layouts_of_sums(*forms[name], used[name].options, shape) for name in names)
            assert ours == theirs, (part, num_chunks)


def columns_of_a_row(ttgir: str) -> set[tuple[str, ...]]:
    """The part of the sums' layouts that maps a row's columns to threads."""
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", ttgir, re.M))
    reduced = re.findall(r'"tt\.reduce"\(.*?\}\) : \(tensor<\w+, (#\w+)>', ttgir, re.S)
    assert reduced
    return {tuple(re.findall(r"instrShape = \[.*?\]|(?<=, )\d+(?=\])|order = \[.*?\]", layouts[name])) for name in reduced}


@pytest.mark.parametrize(("head_dim", "dtype"), [(128, torch.bfloat16), (32, torch.bfloat16), (32, torch.float32)], ids=str)
def test_a_row_is_summed_over_the_same_threads_packed_and_paged(head_dim: int, dtype: torch.dtype):
    """Otherwise decode and training would differ in bits: on sm_90 their tiles have different heights, and Triton
    chooses each kernel's layout separately."""
    from kernels.attention.triton_kernel import forms

    kernels = [what for what in forms(head_dim, dtype, 4) if "bwd" not in what.name]
    packed, prefix, own = (columns_of_a_row(build_for(what, 90)[0].asm["ttgir"]) for what in kernels)
    assert packed == prefix == own and len(packed) == 1
