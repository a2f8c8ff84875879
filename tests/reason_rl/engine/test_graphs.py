"""Decode steps by CUDA graphs: padded batches, fixed buffers and replays give the bits of a step run op by op.

On the CPU a fake capture keeps the function and a replay calls it; on a GPU it is a CUDA graph.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

from reason_rl.config import EngineConfig, load_config
from reason_rl.engine import Engine
from reason_rl.engine.graphs import Outputs, StepGraphs, StepInputs, capture_cuda
from reason_rl.records import Group
from tests.reason_rl.run.tiny_run import ROOT
from tests.reason_rl.tiny import CPU, DENSE, MOE, make_engine, num_different, problem, sampling, tiny_model


def remember(step: Callable[[], Outputs]) -> tuple[Outputs, Callable[[], None]]:
    """A fake graph: a replay reads its inputs' present values and writes the same outputs."""
    outputs = tuple(torch.empty_like(output) for output in step())

    def replay() -> None:
        for kept, new in zip(outputs, step(), strict=True):
            kept.copy_(new)

    return outputs, replay


def generate(engine: Engine, **options: object) -> list[Group]:
    problems = [problem(i, (5, 16, 31, 129)[i % 4]) for i in range(7)]
    return engine.generate(problems, 3, sampling(20, **options), step=0, with_routed_experts=engine.model.config.num_experts > 1)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", [MOE, DENSE], ids=["moe", "dense"])
@pytest.mark.parametrize("engine_options", [{}, {"num_blocks": 22}, {"max_num_seqs": 5}], ids=str)
def test_padded_steps_in_fixed_buffers_draw_the_same_bits(config: object, dtype: torch.dtype, engine_options: dict[str, int]):
    model = tiny_model(config, dtype=dtype)  # type: ignore[arg-type]
    plain, graphs = (make_engine(model, decoder="ops", **engine_options) for _ in range(2))
    graphs.graphs = StepGraphs(12, remember)
    want = generate(plain)
    got = generate(graphs)
    assert got == want and num_different(model, got) == 0  # the recorded experts too: the trainer replays them
    assert graphs.num_preemptions == plain.num_preemptions and (plain.num_preemptions > 0) == ("num_blocks" in engine_options)
    assert 0 < graphs.graphs.num_captured <= 10


def test_graphs_are_captured_once_and_read_the_weights_as_they_are():
    model = tiny_model(MOE)
    engine = make_engine(model, decoder="ops")
    engine.graphs = StepGraphs(32, remember)
    before = generate(engine)
    count = engine.graphs.num_captured
    with torch.no_grad():
        model.blocks[1].mlp.down_proj += 0.3  # type: ignore[union-attr, operator]
    after = generate(engine)
    assert engine.graphs.num_captured == count and after != before and num_different(model, after) == 0
    generate(engine, temperature=0.5)
    assert engine.graphs.num_captured > count  # a constant of the captured step


def test_a_new_cache_takes_the_graphs_with_it():
    engine = make_engine(tiny_model(MOE), decoder="ops")
    engine.graphs = StepGraphs(32, remember)
    engine.generate([problem(0, 5)], 2, sampling(20, stop_ids=()), step=0)
    assert engine.graphs.num_captured == 1
    longer = engine.generate([problem(1, 200)], 2, sampling(40, stop_ids=()), step=0)
    assert engine.graphs.num_captured == 1 and num_different(engine.model, longer) == 0


def test_batches_above_the_bound_go_op_by_op():
    engine = make_engine(tiny_model(MOE), decoder="ops")
    engine.graphs = StepGraphs(4, remember)
    engine.generate([problem(i, 5) for i in range(5)], 1, sampling(20, stop_ids=()), step=0)
    assert engine.graphs.num_captured == 0


def test_padding_sequences_read_the_null_block_and_no_prompt():
    inputs = StepInputs(4, 2, 3, CPU)
    for newest in (9, 8):  # the second run overwrites the first one's values
        inputs.fill({"newest": np.array([newest]), "noise_keys": np.array([5]), "own_lens": np.array([17]),
                     "prefix_index": np.array([0]), "own_table": np.array([[7, 6]]), "prefix_table": np.array([[3]]),
                     "prefix_lens": np.array([11])})
        got = {name: tensor.tolist() for name, tensor in inputs.tensors.items()}
        assert got == {
            "newest": [newest, 0, 0, 0], "noise_keys": [5, 0, 0, 0], "own_lens": [17, 1, 1, 1], "prefix_index": [0, 4, 4, 4],
            "own_table": [[7, 6, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]],
            "prefix_table": [[3, 0], [0, 0], [0, 0], [0, 0], [0, 0]], "prefix_lens": [11, 0, 0, 0, 0]}
    assert inputs.tensors["newest"].data_ptr() != inputs.arrays["newest"].data_ptr()


def test_the_bound_is_a_key_of_the_config_and_of_cuda_alone():
    assert load_config(overrides=["--engine.cuda_graph_batch=64"]).engine.cuda_graph_batch == 64
    with pytest.raises(ValueError, match=r"engine.cuda_graph_batch must be at least 0, got -1"):
        load_config(overrides=["--engine.cuda_graph_batch=-1"])
    assert Engine(tiny_model(MOE), replace(EngineConfig(), cuda_graph_batch=64), 7).graphs is None


def test_experts_by_torchs_products_which_wait_for_the_device_are_refused_at_the_start():
    off = ["--engine.cuda_graph_batch=64", "--run.exact=off"]
    with pytest.raises(ValueError, match=r"engine.cuda_graph_batch=64 cannot go with run.exact='off' and experts"):
        load_config(overrides=off)
    dense = ["--model.num_experts=1", "--model.intermediate_size=96"]
    assert load_config(overrides=[*off, *dense]).engine.cuda_graph_batch == 64


@pytest.mark.parametrize(("error", "message"), [
    (torch.OutOfMemoryError("no memory left"), "no memory left"), (RuntimeError("not permitted"), "cannot be captured")], ids=str)
def test_out_of_memory_in_a_capture_is_not_reported_as_a_sync(
    error: RuntimeError, message: str, monkeypatch: pytest.MonkeyPatch
):
    cuda = MagicMock()
    cuda.graph.return_value.__exit__.return_value = False  # raises the error
    monkeypatch.setattr(torch, "cuda", cuda)
    step = MagicMock(side_effect=[(), error])  # the run beforehand, and the captured one
    with pytest.raises(type(error), match=message):
        capture_cuda(step)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", [MOE, DENSE], ids=["moe", "dense"])
def test_cuda_graphs_draw_the_bits_of_eager_steps(config: object, dtype: torch.dtype):
    model = tiny_model(config, dtype=dtype).cuda()  # type: ignore[arg-type]
    plain, graphs = make_engine(model), make_engine(model, cuda_graph_batch=32)
    assert generate(graphs) == generate(plain)
    assert graphs.graphs is not None and graphs.graphs.num_captured > 0
    with torch.no_grad():
        model.blocks[1].attention.qkv_proj.weight *= 1.1  # type: ignore[union-attr, operator]
    assert generate(graphs) == generate(plain)


@pytest.mark.gpu
def test_a_step_that_waits_for_the_gpu_is_refused_in_words():
    """In a separate process: after a failed capture, torch stays on the capture's stream."""
    program = ("import torch; from reason_rl.engine.graphs import capture_cuda; total = torch.zeros(1, device='cuda'); "
               "capture_cuda(lambda: (total * float(total),))")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0 and "engine.cuda_graph_batch: a decode step cannot be captured" in done.stderr, done.stderr
