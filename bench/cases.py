"""One op on one shape, by all implementations: time, memory, error, and whether two runs give equal bits.

A `Case` has the inputs, the sides (our implementations, torch's, torch.compile of the reference, installed
peers) and the least work that the op needs. Each bench/<op>.py makes a list of cases, the most important
first. `measure` turns a case into rows with timing.py; suite.py runs the cases and prints the rows.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench.harness import spread
from bench.timing import SHORT_S, Call, ClockTimer, Effort, EventTimer, GraphTimer, Timer, in_words, num_copies, take_turns
from kernels.__main__ import import_ops
from kernels.dispatch import REGISTRY

DIRECTIONS = ("forward", "backward", "full")
COMPILED = "torch.compile"
OTHER_DEVICE = ("CPU only", "CUDA only")
Inputs = dict[str, Any]
Row = dict[str, Any]


@dataclass(frozen=True)
class Side:
    call: Callable[..., Any]
    """(**inputs) -> a tensor or a tuple of tensors; gradients are those of the first."""
    prepare: Callable[[Inputs], Inputs] | None = None
    """Converts the inputs to the side's layout, not timed. Gradients of such a side are not compared."""
    select: Callable[[Any], Any] = lambda outputs: outputs
    """Converts its outputs to the common layout, not timed."""


@dataclass(frozen=True)
class Case:
    op: str
    shape: str
    dtype: torch.dtype
    make: Callable[[], Inputs]
    sides: Mapping[str, Side | str]
    """By name; a text is the reason why that side cannot run."""
    exact: Callable[..., Any]
    """The reference; it gets float64 inputs."""
    work: Mapping[str, tuple[float, float]]
    """{"forward": (FLOPs, bytes), "backward": ..}: the least work; "full" defaults to the sum of both."""
    wanted: tuple[str, ...] = ()
    """The inputs that get gradients; empty: forward only."""
    directions: tuple[str, ...] = ()
    """Default: forward, and with `wanted` backward and full."""
    check: Callable[[], Inputs] | None = None
    """Makes smaller inputs for the error, if float64 would not fit in memory."""

    @property
    def ways(self) -> tuple[str, ...]:
        return self.directions or (DIRECTIONS if self.wanted else ("forward",))

    def least(self, direction: str) -> tuple[float, float]:
        """(FLOPs, bytes)"""
        if direction in self.work:
            return self.work[direction]
        (flops, num_bytes), (more_flops, more_bytes) = self.work["forward"], self.work["backward"]
        return flops + more_flops, num_bytes + more_bytes


@dataclass(frozen=True)
class Setup:
    """Device and scale that a bench/<op>.py makes its cases for."""

    device: torch.device
    scale: str = "small"
    """"numbers": the large shapes, then the small ones; "small"; "tiny", for tests."""
    with_compile: bool = False

    def __post_init__(self) -> None:
        import_ops()

    def pick(self, shapes: Mapping[str, Sequence[Any]]) -> list[Any]:
        return [*shapes["numbers"], *shapes["small"]] if self.scale == "numbers" else list(shapes[self.scale])

    def ours(self, op: str, call: Callable[..., Any], dtype: torch.dtype) -> dict[str, Side | str]:
        """Name -> `call(**inputs, impl=name)`, for each implementation of this device."""
        found: dict[str, Side | str] = {}
        for implementation in REGISTRY[op].implementations:
            reason = implementation.refusal(self.device, dtype)
            if reason not in OTHER_DEVICE:
                found[implementation.name] = reason or Side(functools.partial(call, impl=implementation.name))
        return found

    def compiled(self, call: Callable[..., Any]) -> dict[str, Side | str]:
        """torch.compile of `call`, compiled at its first use."""
        if not self.with_compile:
            return {}
        import torch._functorch.config

        torch._functorch.config.donated_buffer = False  # timing runs backward twice on one forward pass
        return {COMPILED: Side(torch.compile(call, dynamic=False))}


def as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def map_tensors(change: Callable[[torch.Tensor], torch.Tensor], inputs: Inputs) -> Inputs:
    return {name: change(value) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}


def in_double(inputs: Inputs) -> Inputs:
    return map_tensors(lambda x: x.double() if x.is_floating_point() else x, inputs)


class Upstream:
    """The gradient of a first output, by its shape and dtype: the same for all sides."""

    def __init__(self) -> None:
        self.made: dict[Any, torch.Tensor] = {}

    def __call__(self, out: torch.Tensor) -> torch.Tensor:
        key = out.shape, out.dtype
        if key not in self.made:
            generator = torch.Generator(out.device).manual_seed(1)
            drawn = torch.randn(out.shape, generator=generator, device=out.device).bfloat16()  # exact in every dtype
            self.made[key] = drawn.to(out.dtype) if out.dim() else torch.ones_like(out)
        return self.made[key]


def leaves(inputs: Inputs, wanted: Sequence[str]) -> Inputs:
    return inputs | {name: inputs[name].detach().requires_grad_() for name in wanted}


def call_of(call: Callable[..., Any], inputs: Inputs, wanted: Sequence[str], direction: str, upstream: Upstream) -> Call:
    """The timed function of one direction of `call`, on `inputs` detached from other calls' graphs."""
    own = leaves(inputs, wanted)

    def gradients(outputs: Any, again: bool) -> tuple[torch.Tensor, ...]:
        out = as_tuple(outputs)[0]
        return torch.autograd.grad(out, [own[name] for name in wanted], upstream(out), retain_graph=again)

    if direction == "backward":
        return Call(gradients, before=lambda: call(**own))
    if direction == "full":
        return Call(lambda _, again: gradients(call(**own), False))
    return Call(lambda _, again: call(**own))


def error_of(got: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> float | None:
    """max |got - want| / |want| over results (L2 norms; integers: share that differs); None if not finite."""
    errors = []
    for mine, true in zip(got, want, strict=False):
        if not true.numel():
            continue
        if not true.is_floating_point():
            errors.append(float((mine != true).double().mean()))
            continue
        off, size = float((mine.double() - true).norm()), float(true.norm())
        errors.append(off / size if size else off)
    worst = max(errors, key=lambda e: math.inf if math.isnan(e) else e, default=0.0)
    return worst if math.isfinite(worst) else None


def same_bits(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> bool:
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return all(torch.equal(x.contiguous().view(integers[x.element_size()]), y.contiguous().view(integers[y.element_size()]))
               for x, y in zip(a, b, strict=True))


def free_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


class PeakMemory:
    """Peak GPU memory within the block, minus the memory allocated before it; None on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.before_bytes = device, 0
        self.peak_bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            self.before_bytes = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        return self

    def __exit__(self, *exception: object) -> None:
        if self.device.type == "cuda":
            self.peak_bytes = torch.cuda.max_memory_allocated(self.device) - self.before_bytes


class Measurement:
    """One case on one device: its inputs, the float64 results, and the rows of its sides."""

    def __init__(self, case: Case, setup: Setup, effort: Effort, deadline_s: float) -> None:
        self.case, self.device, self.effort, self.deadline_s = case, setup.device, effort, deadline_s
        self.inputs, self.upstream = case.make(), Upstream()
        self.check = self.inputs if case.check is None else case.check()
        self.truth, self.no_truth = None, ""
        try:
            self.truth = {part: self.result(Side(case.exact), way, in_double(self.check))
                          for part, way in (("forward", "forward"), ("backward", "full")) if part == "forward" or case.wanted}
        except Exception as error:
            self.no_truth = in_words(error)

    @functools.cached_property
    def copies(self) -> list[Inputs]:
        """Enough copies of the inputs for a GraphTimer; the first is the original."""
        num_bytes = sum(x.nbytes for x in self.inputs.values() if isinstance(x, torch.Tensor))
        return [self.inputs, *(map_tensors(torch.clone, self.inputs) for _ in range(num_copies(num_bytes, self.device) - 1))]

    def call(self, side: Side, direction: str, inputs: Inputs) -> Call:
        own = inputs if side.prepare is None else side.prepare(inputs)
        return call_of(side.call, own, self.case.wanted, direction, self.upstream)

    def result(self, side: Side, direction: str, inputs: Inputs) -> list[torch.Tensor]:
        """The outputs of "forward", the gradients of the other directions."""
        call = self.call(side, direction, inputs)
        given = call.run(call.before(), False)
        return [x.detach() for x in as_tuple(side.select(given) if direction == "forward" else given)]

    def facts(self, side: Side, direction: str) -> Row:
        """Error, equality of two runs, and memory. The runs also trigger compilation before timing."""
        # The error.
        part = "forward" if direction == "forward" else "backward"
        is_alike = part == "forward" or side.prepare is None
        error = error_of(self.result(side, direction, self.check), self.truth[part]) if self.truth and is_alike else None

        # Two runs.
        call = self.call(side, direction, self.inputs)
        first = as_tuple(call.run(call.before(), False))
        free_memory(self.device)
        with PeakMemory(self.device) as memory:
            second = as_tuple(call.run(call.before(), False))
        return {"error": error, "same_bits": same_bits(first, second), "peak_bytes": memory.peak_bytes}

    def timers(self, sides: Mapping[str, Side], direction: str, failures: dict[str, str]) -> dict[str, Timer]:
        """A timer per side. If the fastest is short: CUDA graphs, for sides that can be captured."""
        # The clock on a CPU, events on a GPU.
        found: dict[str, Any] = {}
        cache = torch.empty(1 << 28, dtype=torch.uint8, device=self.device) if self.device.type == "cuda" else None
        for name, side in sides.items():
            try:
                call = self.call(side, direction, self.inputs)
                found[name] = (ClockTimer(call, self.effort.warmup_s) if cache is None
                               else EventTimer(call, self.effort.warmup_s, cache))
            except Exception as error:
                failures[name] = in_words(error)
        if cache is None or min((timer.estimate_s for timer in found.values()), default=1.0) >= SHORT_S:
            return found

        # Graphs.
        for name in found:
            try:
                found[name] = GraphTimer([self.call(sides[name], direction, x) for x in self.copies], self.effort.warmup_s)
            except Exception as error:
                found[name].how = f"events; no graph: {in_words(error)}"
        return found

    def rows(self) -> Iterator[Row]:
        case = self.case
        base = {"op": case.op, "shape": case.shape, "dtype": str(case.dtype).removeprefix("torch.")}
        if self.no_truth:
            yield base | {"direction": "all", "side": "float64", "says": self.no_truth}
        for direction in case.ways:
            # Facts of the sides that can run; `says` has the reasons of the others.
            says = {name: side for name, side in case.sides.items() if isinstance(side, str)}
            facts: dict[str, Row] = {}
            for name, side in case.sides.items():
                if isinstance(side, str):
                    continue
                if time.monotonic() > self.deadline_s:
                    says[name] = "left out: no time was left"
                    continue
                try:
                    facts[name] = self.facts(side, direction)
                except Exception as error:
                    says[name] = in_words(error)

            # Times, in turn.
            sides = {name: side for name, side in case.sides.items() if name in facts and not isinstance(side, str)}
            timers = self.timers(sides, direction, says)
            seconds = take_turns(timers, self.effort, says)

            # A row per side.
            flops, num_bytes = case.least(direction)
            for name in case.sides:
                row = base | {"direction": direction, "side": name}
                if name in says:
                    yield row | {"says": says[name]}
                else:
                    times = {f"{key}_s": value for key, value in spread(seconds[name]).items()}
                    yield row | times | facts[name] | {"how": timers[name].how, "flops": flops, "bytes": num_bytes}


def measure(case: Case, setup: Setup, effort: Effort, deadline_s: float = math.inf) -> list[Row]:
    """Rows of every side and direction. After `deadline_s` (time.monotonic) nothing more is measured. A side
    that fails has the error in its row; a case whose inputs cannot be made has one row with the error."""
    base = {"op": case.op, "shape": case.shape, "dtype": str(case.dtype).removeprefix("torch."), "direction": "all", "side": "all"}
    if time.monotonic() > deadline_s:
        return [base | {"says": "left out: no time was left"}]

    # The rows; those before an error are kept.
    rows: list[Row] = []
    if setup.with_compile:
        torch._dynamo.reset()
    try:
        for row in Measurement(case, setup, effort, deadline_s).rows():
            rows.append(row)
    except Exception as error:
        rows.append(base | {"says": in_words(error)})

    # Memory for the next case.
    try:
        free_memory(setup.device)
    except RuntimeError as error:  # the device is lost, so every later case will have a row with an error
        rows.append(base | {"says": in_words(error)})
    return rows
