"""Decode steps as CUDA graphs: captured once for each padded batch size, then replayed.

A decode step is hundreds of small kernel launches, and a GPU would wait for Python between them. A graph
holds addresses, not values. The inputs that change from step to step (`StepInputs`) are copied into fixed
buffers, in one transfer. Weights and KV cache are read in place, so new weights in the same tensors need no
new capture. A batch is padded to a power of two with sequences that read and write the null block; the ops
are batch-invariant, so padding does not change the others' bits. `Engine` drops the graphs together with the
cache.

Left out: prefill, since each pack has a different shape.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping

import numpy as np
import torch

Outputs = tuple[torch.Tensor, ...]
"""The tensors that a step returns; the first dimension of each is the sequence."""
Step = Callable[[Mapping[str, torch.Tensor]], Outputs]
"""Inputs -> outputs. Inputs are i64: newest, noise_keys, own_lens, prefix_index [R]; own_table [R, blocks];
prefix_table [P, blocks]; prefix_lens [P]; for R sequences of P prompts."""
Capture = Callable[[Callable[[], Outputs]], tuple[Outputs, Callable[[], None]]]
"""A function -> (its outputs, a function that runs it again into the same outputs)."""


class StepInputs:
    """Fixed input buffers for `num_seqs` sequences and their prompts, and an empty prompt for padding."""

    def __init__(self, num_seqs: int, prefix_blocks: int, own_blocks: int, device: torch.device) -> None:
        shapes = {
            "newest": (num_seqs,), "noise_keys": (num_seqs,), "own_lens": (num_seqs,), "prefix_index": (num_seqs,),
            "own_table": (num_seqs, own_blocks), "prefix_table": (num_seqs + 1, prefix_blocks), "prefix_lens": (num_seqs + 1,)}

        # One flat buffer on the host and one on the device; each input is a view into both.
        sizes = [int(np.prod(shape)) for shape in shapes.values()]
        self._host = torch.zeros(sum(sizes), dtype=torch.int64, pin_memory=device.type == "cuda")
        self._device = self._host.to(device, copy=True)
        self.arrays, self.tensors = (
            {name: view.view(shape) for view, (name, shape) in zip(flat.split(sizes), shapes.items(), strict=True)}
            for flat in (self._host, self._device))

    def fill(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Copies arrays of at most these sizes. The last step's outputs must have been read already."""
        # The padding: one token each, of the empty prompt, in the null block.
        self._host.zero_()
        self.arrays["own_lens"].fill_(1)
        self.arrays["prefix_index"].fill_(len(self.arrays["prefix_lens"]) - 1)
        for name, array in arrays.items():
            self.arrays[name][tuple(slice(0, size) for size in array.shape)] = torch.from_numpy(array)
        self._device.copy_(self._host, non_blocking=True)


def capture_cuda(step: Callable[[], Outputs]) -> tuple[Outputs, Callable[[], None]]:
    """A `Capture`. Runs the step once before, to compile its kernels: running it again writes the same."""
    warmup = torch.cuda.Stream()
    warmup.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warmup):
        step()
    torch.cuda.current_stream().wait_stream(warmup)

    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            outputs = step()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise RuntimeError("engine.cuda_graph_batch: a decode step cannot be captured, because one of its ops waits for the "
                           "GPU (`python -m kernels` lists them); engine.cuda_graph_batch=0 captures none") from error
    return outputs, graph.replay


class StepGraphs:
    """The captured steps, of batches of up to `most` sequences."""

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
        """step(arrays), captured at the first call for its sizes; its outputs are valid until the next call.

        `key`: all else that the step depends on. `own_blocks`: the most blocks of a sequence.
        """
        num_seqs, prefix_blocks = len(arrays["newest"]), arrays["prefix_table"].shape[1]
        if prefix_blocks > self._prefix_blocks:  # rounded up, so that slightly longer prompts need no new capture
            self._prefix_blocks = 1 << (prefix_blocks - 1).bit_length()
        size = min(1 << (num_seqs - 1).bit_length(), self.most)
        key = (key, size, self._prefix_blocks, own_blocks)
        if key not in self._captured:
            inputs = StepInputs(size, self._prefix_blocks, own_blocks, device)
            inputs.fill(arrays)
            self._captured[key] = (inputs, *self._capture(lambda: step(inputs.tensors)))
        inputs, outputs, replay = self._captured[key]
        inputs.fill(arrays)
        replay()
        return tuple(output[:num_seqs] for output in outputs)
