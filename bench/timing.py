"""Timers of a call: CUDA events with a cold cache, CUDA graphs for short calls, the clock on a CPU.

Events are recorded on the GPU before and after a call. The L2 cache is overwritten before each call, so
inputs come from memory. For calls below SHORT_S, events would measure launches instead of kernels. Such calls
are captured in a graph, each with a different copy of the inputs, COLD times the cache in total; the time of
a replay is divided by the calls. Left out: cases and sides (cases.py).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

SHORT_S = 50e-6
COLD = 3
"""Total size of a graph's inputs, in multiples of the L2 cache."""
MAX_COPIES = 256
"""Most copies of the inputs. Very small inputs stay in the cache, as they do in a training step."""
MAX_REPEATS = 200
"""Most calls (or replays) of one round."""


@dataclass(frozen=True)
class Effort:
    """Seconds per side and direction. The sides take turns: each round has rep_s / rounds per side."""

    warmup_s: float = 0.1
    rep_s: float = 0.5
    rounds: int = 5


@dataclass(frozen=True)
class Call:
    """`run(before(), again)`; `before` is not timed. `again`: the same state will be used once more."""

    run: Callable[[Any, bool], object]
    before: Callable[[], Any] = lambda: None


class Timer(Protocol):
    how: str

    def round(self, seconds: float) -> list[float]:
        """Seconds of each call, in a round that takes about `seconds`."""
        ...


class ClockTimer:
    how = "clock"

    def __init__(self, call: Call, warmup_s: float) -> None:
        self.call = call
        self.estimate_s = min(self.once() for _ in range(2))
        for _ in range(_count(warmup_s, self.estimate_s)):
            self.once()

    def once(self) -> float:
        state = self.call.before()
        start = time.perf_counter()
        self.call.run(state, False)
        return time.perf_counter() - start

    def round(self, seconds: float) -> list[float]:
        return [self.once() for _ in range(_count(seconds, self.estimate_s))]


class EventTimer:
    how = "events"

    def __init__(self, call: Call, warmup_s: float, cache: torch.Tensor) -> None:
        self.call, self.cache = call, cache
        self.estimate_s = min(self._times(3))
        self._times(_count(warmup_s, self.estimate_s))

    def _times(self, count: int) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for start, end in events:
            state = self.call.before()
            self.cache.zero_()
            start.record()
            self.call.run(state, False)
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in events]

    def round(self, seconds: float) -> list[float]:
        return self._times(_count(seconds, self.estimate_s))


def refuse_to_wait(run: Callable[[], object]) -> None:
    """Raises if `run` synchronizes with the GPU: capturing it would fail, and break torch's allocator."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode(mode)


class GraphTimer:
    how = "graph"

    def __init__(self, calls: Sequence[Call], warmup_s: float) -> None:
        # The forward passes of "backward" run before the capture; calls that synchronize are refused.
        self.num_calls = len(calls)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # the capture's stream, because backward runs on the stream of its forward
            self.states = [call.before() for call in calls]
            refuse_to_wait(lambda: calls[0].run(self.states[0], True))
        torch.cuda.synchronize()

        # Capture, warm up.
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):
            for call, state in zip(calls, self.states, strict=True):
                call.run(state, True)
        self.estimate_s = min(self._times(3))
        self._times(_count(warmup_s, self.estimate_s * self.num_calls))

    def _times(self, count: int) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for start, end in events:
            start.record()
            self.graph.replay()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 / self.num_calls for start, end in events]

    def round(self, seconds: float) -> list[float]:
        return self._times(_count(seconds, self.estimate_s * self.num_calls))


def _count(seconds: float, each_s: float) -> int:
    return max(1, min(MAX_REPEATS, int(seconds / max(each_s, 1e-9))))


def num_copies(input_bytes: int, device: torch.device) -> int:
    """The number of copies of the inputs in a graph."""
    cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(MAX_COPIES, math.ceil(COLD * cache_bytes / max(input_bytes, 1))))


def in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"


def take_turns(timers: dict[str, Timer], effort: Effort, failures: dict[str, str]) -> dict[str, list[float]]:
    """Seconds of every timer. In each round every timer has a turn, so drift (clocks, heat) affects all
    equally. A timer that fails is left out from then on, and its error is added to `failures`."""
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(effort.rounds):
        for name, timer in timers.items():
            if name in failures:
                continue
            try:
                seconds[name] += timer.round(effort.rep_s / effort.rounds)
            except Exception as error:
                failures[name] = in_words(error)
    return seconds
