"""Every op on a GPU as the model calls it there: a row's bits in any batch, and torch.compile of it.

Each op's own test file compares it with float64 on a GPU too (implementations.py). Sizes here are the default
model's, and those of a model whose tiles fill a GPU, where a kernel could depend on the number of rows. An op
that has only the reference on the GPU is skipped: torch promises no bits.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch

from bench.__main__ import OPS
from bench.attention import pack, paged_inputs, with_plan
from bench.cases import Measurement, Setup, Side
from bench.timing import Effort
from kernels import attention as attention_package
from kernels.attention import attention, paged_attention, plan_pages
from kernels.dispatch import REGISTRY
from kernels.linear import linear
from kernels.linear import make_inputs as linear_inputs
from kernels.linear_logprob import linear_logprob
from kernels.linear_logprob import make_inputs as logprob_inputs
from kernels.moe import experts, route
from kernels.moe import make_inputs as moe_inputs
from kernels.rms_norm import make_inputs as norm_inputs
from kernels.rms_norm import rms_norm
from kernels.rope import make_inputs as rope_inputs
from kernels.rope import rope
from kernels.sample import make_inputs as sample_inputs
from kernels.sample import sample
from kernels.swiglu import make_inputs as swiglu_inputs
from kernels.swiglu import swiglu
from tests.kernels.compare import NUM_ROWS, Tensors, assert_rows_keep_their_bits, same_bits

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
Rows = Callable[[int, int], Tensors]
SIZES = {"default": {"d": 128, "v": 64, "heads": (4, 2, 32), "experts": (8, 2), "i": 96},
         "large": {"d": 2048, "v": 32_000, "heads": (16, 4, 128), "experts": (32, 4), "i": 1024}}
"""Of a model: D, V, (H, K, C), (E, k), I."""


def linear_rows(size: dict[str, object], dtype: torch.dtype) -> Rows:
    inputs = linear_inputs(NUM_ROWS, 2 * size["d"], size["d"], dtype, "cuda")
    return lambda start, end: linear(inputs["x"][start:end], inputs["weight"])


def router_rows(size: dict[str, object], dtype: torch.dtype) -> Rows:
    inputs = linear_inputs(NUM_ROWS, size["experts"][0], size["d"], torch.float32, "cuda")
    return lambda start, end: linear(inputs["x"][start:end], inputs["weight"])


def logprob_rows(size: dict[str, object], dtype: torch.dtype) -> Rows:
    hidden, weight, ids = logprob_inputs(NUM_ROWS, size["d"], size["v"], dtype, "cuda").values()
    return lambda start, end: linear_logprob(hidden[start:end], weight, ids[start:end], 0.7)


def sample_rows(size: dict[str, object], dtype: torch.dtype, **options: float) -> Rows:
    hidden, weight, keys, positions = sample_inputs(NUM_ROWS, size["d"], size["v"], dtype, "cuda").values()
    return lambda start, end: sample(hidden[start:end], weight, keys[start:end], positions[start:end], **options)


def expert_rows(size: dict[str, object], dtype: torch.dtype) -> Rows:
    x, gate_up, down, ids, weights = moe_inputs(NUM_ROWS, *size["experts"], size["d"], size["i"], dtype, "cuda").values()
    return lambda start, end: experts(x[start:end], gate_up, down, ids[start:end], weights[start:end])


def route_rows(size: dict[str, object], dtype: torch.dtype) -> Rows:
    num_experts, k = size["experts"]
    logits = torch.randn(NUM_ROWS, num_experts, generator=torch.Generator(CUDA).manual_seed(0), device=CUDA)
    return lambda start, end: tuple(route(logits[start:end], k))


def norm_rows(size: dict[str, object], dtype: torch.dtype) -> Rows:
    x, weight = norm_inputs((NUM_ROWS, size["d"]), dtype, "cuda").values()
    return lambda start, end: rms_norm(x[start:end], weight)


def rope_rows(size: dict[str, object], dtype: torch.dtype) -> Rows:
    x, cos, sin = rope_inputs(NUM_ROWS, size["heads"][0], size["heads"][2], dtype, "cuda").values()
    return lambda start, end: rope(x[start:end], cos[start:end], sin[start:end])


def swiglu_rows(size: dict[str, object], dtype: torch.dtype) -> Rows:
    x = swiglu_inputs(NUM_ROWS, size["i"], dtype, "cuda")["gate_up"]
    return lambda start, end: swiglu(x[start:end])


def attention_rows(size: dict[str, object], dtype: torch.dtype) -> Rows:
    """A row is a group: a prompt and two completions, shorter and longer than a tile."""
    groups, length = NUM_ROWS, 37 + 2 * 41
    inputs = with_plan(pack(groups, 37, 2, 41), size["heads"], dtype, CUDA)

    def run(start: int, end: int) -> torch.Tensor:
        q, k, v = (inputs[name][start * length : end * length] for name in "qkv")
        plan = attention_package.plan_segments(torch.tensor(pack(end - start, 37, 2, 41), dtype=torch.int32), len(q), CUDA)
        return attention(q, k, v, plan).view(end - start, -1)
    return run


def paged_rows(size: dict[str, object], dtype: torch.dtype) -> Rows:
    """A row is a sequence with a separate prompt."""
    inputs = paged_inputs(NUM_ROWS, 1, 160, 32, size["heads"], dtype, CUDA)
    pages = inputs["pages"]

    def run(start: int, end: int) -> torch.Tensor:
        part = plan_pages(
            prefix_table=pages.prefix_table[start:end], prefix_lens=pages.prefix_lens[start:end],
            prefix_index=torch.arange(end - start, device=CUDA), own_table=pages.own_table[start:end],
            own_lens=pages.own_lens[start:end] - torch.arange(start, end, device=CUDA) % 17, num_kv_heads=pages.num_kv_heads,
            num_blocks=pages.num_blocks)
        return paged_attention(inputs["q"][start:end], inputs["k_cache"], inputs["v_cache"], part)
    return run


ROWS_OF = {
    "linear": linear_rows, "linear, router": router_rows, "linear_logprob": logprob_rows, "sample": sample_rows,
    "sample, cut": lambda size, dtype: sample_rows(size, dtype, top_k=20, top_p=0.9, min_p=0.01),
    "moe_experts": expert_rows, "moe_route": route_rows, "rms_norm": norm_rows, "rope": rope_rows, "swiglu": swiglu_rows,
    "attention": attention_rows, "paged_attention": paged_rows}


def skip_where_the_reference_runs(op: str, dtype: torch.dtype) -> None:
    if REGISTRY[op].resolve(CUDA, torch.float32 if op == "moe_route" else dtype).name == "reference":
        pytest.skip(f"{op}: only the reference runs on CUDA, and torch promises no bits there")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ROWS_OF)
def test_a_row_has_the_same_bits_in_any_batch(name: str, size: str, dtype: torch.dtype):
    skip_where_the_reference_runs(name.split(",")[0], dtype)
    assert_rows_keep_their_bits(ROWS_OF[name](SIZES[size], dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"top_k": 20, "top_p": 0.9}], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_the_samplers_logprob_is_the_trainers(size: str, options: dict[str, float], dtype: torch.dtype):
    for op in ("sample", "linear_logprob"):
        skip_where_the_reference_runs(op, dtype)
    hidden, weight, keys, positions = sample_inputs(100, SIZES[size]["d"], SIZES[size]["v"], dtype, "cuda").values()
    token, logprob, _ = sample(hidden, weight, keys, positions, **options)
    assert same_bits(linear_logprob(hidden, weight, token)[0], logprob)


BREAKS_THE_GRAPH = ("sample",)
"""Checks values on the host."""


@pytest.mark.parametrize("op", OPS)
def test_a_compiled_op_gives_the_same_bits(op: str):
    setup = Setup(CUDA, "small")
    for case in importlib.import_module(f"bench.{op}").cases(setup):
        automatic = [i.name for i in REGISTRY[case.op].implementations if i.is_automatic] if case.op in REGISTRY else []
        name = next((name for name in automatic if isinstance(case.sides.get(name), Side)), "")
        side = case.sides.get(name)
        if name == "reference" or not isinstance(side, Side):
            pytest.skip(f"{case.op}: no kernel of ours runs on CUDA here")
        torch._dynamo.reset()
        measurement = Measurement(case, setup, Effort(), 0.0)
        compiled = Side(torch.compile(side.call, fullgraph=case.op not in BREAKS_THE_GRAPH, dynamic=False))
        for direction in {"forward", "full"} & set(case.ways):
            want, got = (measurement.result(each, direction, measurement.inputs) for each in (side, compiled))
            assert all(same_bits(a, b) for a, b in zip(got, want, strict=True)), (case.op, case.shape, direction)
