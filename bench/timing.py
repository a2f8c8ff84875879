"""How one call is timed: by events over a cleared cache, by a CUDA graph where calls are short, by the clock on a CPU.

Events stand on the device's own time line, before and after the call; the cache is cleared before them, so that inputs come from
memory. Below SHORT_S that measures launches and not kernels: then many calls on inputs of their own, together COLD times the cache,
are captured in a graph, and a replay's time is shared out among them. Leaves out what is timed, and beside what (cases.py).
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
"""Times the L2 cache that a graph's inputs come to."""
MAX_COPIES = 256
"""Inputs too small to come to that even so stay in the cache, as a step would leave them there."""
MAX_REPEATS = 200
"""Calls of one round."""


@dataclass(frozen=True)
class Effort:
    """Seconds a side gets in one direction, shared out over rounds in which the sides take turns."""

    warmup_s: float = 0.1
    rep_s: float = 0.5
    rounds: int = 5


@dataclass(frozen=True)
class Call:
    """`run(before(), again)`, timed without `before`. `again`: the same state will be run once more."""

    run: Callable[[Any, bool], object]
    before: Callable[[], Any] = lambda: None


class Timer(Protocol):
    how: str

    def round(self, seconds: float) -> list[float]:
        """Seconds of each call of a round that takes about so long."""
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
    """Raises where `run` would wait for the device: that cannot be captured, and torch's allocator would not get over it."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode(mode)


class GraphTimer:
    how = "graph"

    def __init__(self, calls: Sequence[Call], warmup_s: float) -> None:
        self.num_calls = len(calls)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # a backward pass runs on the stream of its forward pass: that of the capture
            self.states = [call.before() for call in calls]
            refuse_to_wait(lambda: calls[0].run(self.states[0], True))
        torch.cuda.synchronize()
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
    """How many inputs a graph goes round."""
    cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(MAX_COPIES, math.ceil(COLD * cache_bytes / max(input_bytes, 1))))


def in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"


def take_turns(timers: dict[str, Timer], effort: Effort, failures: dict[str, str]) -> dict[str, list[float]]:
    """Every timer's seconds, over rounds in which each has its turn: what drifts (clocks, heat) drifts for all. One that fails is
    left out from then on, its words in `failures`."""
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
