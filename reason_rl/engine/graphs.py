"""Decode steps as CUDA graphs: captured once for each padded batch size, replayed for every step after.

A decode step is hundreds of small launches; on a GPU it would wait for Python. A graph holds addresses, not values: what changes
from step to step (`StepInputs`) stands in buffers that stay, and is copied there in one piece; weights and cache are read where
they are, so new weights in the same tensors need no new graph. A batch is padded to a power of two by rows that read and write
block 0, which is nobody's: a row's bits do not depend on the rows beside it. `Engine` drops the graphs with the cache.

Left out: prefill, whose packs have a shape of their own each time.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping

import numpy as np
import torch

Outputs = tuple[torch.Tensor, ...]
"""Of a step, each with a row a sequence."""
Step = Callable[[Mapping[str, torch.Tensor]], Outputs]
"""From a step's inputs, i64 each: newest, noise_keys, own_lens, prefix_index [R]; own_table [R, NO]; prefix_table [B, NP];
prefix_lens [B]."""
Capture = Callable[[Callable[[], Outputs]], tuple[Outputs, Callable[[], None]]]
"""A function -> its outputs, and what makes it run again into the same outputs."""


class StepInputs:
    """Room for `rows` sequences and their prefixes, and one prefix more, empty, for the rows that pad."""

    def __init__(self, rows: int, prefix_blocks: int, own_blocks: int, device: torch.device) -> None:
        shapes = {
            "newest": (rows,), "noise_keys": (rows,), "own_lens": (rows,), "prefix_index": (rows,), "own_table": (rows, own_blocks),
            "prefix_table": (rows + 1, prefix_blocks), "prefix_lens": (rows + 1,)}
        sizes = [int(np.prod(shape)) for shape in shapes.values()]
        self._host = torch.zeros(sum(sizes), dtype=torch.int64, pin_memory=device.type == "cuda")
        self._device = self._host.to(device, copy=True)
        self.arrays, self.tensors = (
            {name: part.view(shape) for part, (name, shape) in zip(flat.split(sizes), shapes.items(), strict=True)}
            for flat in (self._host, self._device))

    def fill(self, arrays: Mapping[str, np.ndarray]) -> None:
        """From arrays of at most these sizes. The last step's outputs must have been read, so that its copy is over."""
        self._host.zero_()
        self.arrays["own_lens"].fill_(1)
        self.arrays["prefix_index"].fill_(len(self.arrays["prefix_lens"]) - 1)
        for name, array in arrays.items():
            self.arrays[name][tuple(slice(0, size) for size in array.shape)] = torch.from_numpy(array)
        self._device.copy_(self._host, non_blocking=True)


def capture_cuda(step: Callable[[], Outputs]) -> tuple[Outputs, Callable[[], None]]:
    """Runs it once beforehand, so that kernels are compiled; that changes nothing, since a step writes the same again."""
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        step()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            outputs = step()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise RuntimeError("engine.cuda_graph_batch: a decode step cannot be captured, an op of it waits for the GPU "
                           "(`python -m kernels` lists what runs); engine.cuda_graph_batch=0 goes without") from error
    return outputs, graph.replay


class StepGraphs:
    """The captured steps, for batches of up to `most` sequences."""

    def __init__(self, most: int, capture: Capture = capture_cuda) -> None:
        self.most, self._capture = most, capture
        self._captured: dict[Hashable, tuple[StepInputs, Outputs, Callable[[], None]]] = {}
        self._prefix_blocks = 1

    @property
    def num_captured(self) -> int:
        return len(self._captured)

    def forget(self) -> None:
        self._captured.clear()

    def run(self, step: Step, key: Hashable, arrays: Mapping[str, np.ndarray], own_blocks: int, device: torch.device) -> Outputs:
        """`step` of `arrays`; key: all that it depends on beside them, own_blocks: the most blocks that a sequence will have.
        The outputs stand until the next call."""
        rows, prefix_blocks = len(arrays["newest"]), arrays["prefix_table"].shape[1]
        if prefix_blocks > self._prefix_blocks:  # room for the longest prompt so far, and then some
            self._prefix_blocks = 1 << (prefix_blocks - 1).bit_length()
        size = min(1 << (rows - 1).bit_length(), self.most)
        key = (key, size, self._prefix_blocks, own_blocks)
        if key not in self._captured:
            inputs = StepInputs(size, self._prefix_blocks, own_blocks, device)
            inputs.fill(arrays)
            self._captured[key] = (inputs, *self._capture(lambda: step(inputs.tensors)))
        inputs, outputs, replay = self._captured[key]
        inputs.fill(arrays)
        replay()
        return tuple(output[:rows] for output in outputs)
