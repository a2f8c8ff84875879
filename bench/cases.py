"""One op on one shape, by everyone who can: its time, memory, error against float64, and whether two runs give the same bits.

A `Case` names the inputs, the sides (our implementations, torch's own, torch.compile of the reference, installed peers), and the
work that must be done at least. Each bench/<op>.py makes a list of them, the most telling first; `measure` turns one into rows, by
timing.py; suite.py runs them and shows the rows.
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
    """(**inputs) -> a tensor or a tuple of them; the first is the one that gradients come from."""
    prepare: Callable[[Inputs], Inputs] | None = None
    """Outside the clock: the inputs in a layout of its own. Its gradients then are not compared."""
    select: Callable[[Any], Any] = lambda outputs: outputs
    """Outside the clock: its outputs as the others give them."""


@dataclass(frozen=True)
class Case:
    op: str
    shape: str
    dtype: torch.dtype
    make: Callable[[], Inputs]
    sides: Mapping[str, Side | str]
    """By name; a text says why there is none."""
    exact: Callable[..., Any]
    """The reference, which is given float64."""
    work: Mapping[str, tuple[float, float]]
    """{"forward": (FLOPs, bytes), "backward": ..}: what none can do without; "full" is their sum where it is not given."""
    wanted: tuple[str, ...] = ()
    """The inputs that gradients are taken of; without any, forward is all there is."""
    directions: tuple[str, ...] = ()
    """By default all there are."""
    check: Callable[[], Inputs] | None = None
    """Smaller inputs to take the errors on, where float64 would not fit."""

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
    """Where and how much: what each bench/<op>.py makes its cases for."""

    device: torch.device
    scale: str = "small"
    """"numbers": the large shapes, then the small ones; "small"; "tiny", for tests."""
    with_compile: bool = False

    def __post_init__(self) -> None:
        import_ops()

    def pick(self, shapes: Mapping[str, Sequence[Any]]) -> list[Any]:
        return [*shapes["numbers"], *shapes["small"]] if self.scale == "numbers" else list(shapes[self.scale])

    def ours(self, op: str, call: Callable[..., Any], dtype: torch.dtype) -> dict[str, Side | str]:
        """`call(**inputs, impl=name)` for each implementation that is meant for this device, by its name."""
        found: dict[str, Side | str] = {}
        for implementation in REGISTRY[op].implementations:
            reason = implementation.refusal(self.device, dtype)
            if reason not in OTHER_DEVICE:
                found[implementation.name] = reason or Side(functools.partial(call, impl=implementation.name))
        return found

    def compiled(self, call: Callable[..., Any]) -> dict[str, Side | str]:
        """torch.compile of `call`, at its first use."""
        if not self.with_compile:
            return {}
        import torch._functorch.config

        torch._functorch.config.donated_buffer = False  # a graph of the backward pass alone runs it twice on one forward pass
        return {COMPILED: Side(torch.compile(call, dynamic=False))}


def as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def map_tensors(change: Callable[[torch.Tensor], torch.Tensor], inputs: Inputs) -> Inputs:
    return {name: change(value) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}


def in_double(inputs: Inputs) -> Inputs:
    return map_tensors(lambda x: x.double() if x.is_floating_point() else x, inputs)


class Upstream:
    """One gradient for each shape and dtype of a first output: the same for all sides."""

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
    """The direction of `call` on `inputs`; gradients are with respect to leaves of its own."""
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
    """The largest over results of |got - want| / |want| (Euclidean; of integers, the share that differs); None if not finite."""
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
    """The most that a GPU held within the block, above what it held before; None of a CPU."""

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
    """One case on one device: its inputs, the truth, and what each side does with them."""

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
        """Inputs enough for a graph to go round, the first of them the case's own."""
        num_bytes = sum(x.nbytes for x in self.inputs.values() if isinstance(x, torch.Tensor))
        return [self.inputs, *(map_tensors(torch.clone, self.inputs) for _ in range(num_copies(num_bytes, self.device) - 1))]

    def call(self, side: Side, direction: str, inputs: Inputs) -> Call:
        own = inputs if side.prepare is None else side.prepare(inputs)
        return call_of(side.call, own, self.case.wanted, direction, self.upstream)

    def result(self, side: Side, direction: str, inputs: Inputs) -> list[torch.Tensor]:
        """The outputs, or of the other directions the gradients: what the timed call gives."""
        call = self.call(side, direction, inputs)
        given = call.run(call.before(), False)
        return [x.detach() for x in as_tuple(side.select(given) if direction == "forward" else given)]

    def facts(self, side: Side, direction: str) -> Row:
        """Error, bits and memory; and the call has run twice, so what is compiled at its first use is compiled."""
        part = "forward" if direction == "forward" else "backward"
        is_alike = part == "forward" or side.prepare is None
        error = error_of(self.result(side, direction, self.check), self.truth[part]) if self.truth and is_alike else None
        call = self.call(side, direction, self.inputs)
        first = as_tuple(call.run(call.before(), False))
        free_memory(self.device)
        with PeakMemory(self.device) as memory:
            second = as_tuple(call.run(call.before(), False))
        return {"error": error, "same_bits": same_bits(first, second), "peak_bytes": memory.peak_bytes}

    def timers(self, sides: Mapping[str, Side], direction: str, failures: dict[str, str]) -> dict[str, Timer]:
        """One a side; all by graph where the quickest is short, except those that cannot be captured."""
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
            sides = {name: side for name, side in case.sides.items() if name in facts and not isinstance(side, str)}
            timers = self.timers(sides, direction, says)
            seconds = take_turns(timers, self.effort, says)
            flops, num_bytes = case.least(direction)
            for name in case.sides:
                row = base | {"direction": direction, "side": name}
                if name in says:
                    yield row | {"says": says[name]}
                else:
                    times = {f"{key}_s": value for key, value in spread(seconds[name]).items()}
                    yield row | times | facts[name] | {"how": timers[name].how, "flops": flops, "bytes": num_bytes}


def measure(case: Case, setup: Setup, effort: Effort, deadline_s: float = math.inf) -> list[Row]:
    """Every side in every direction; `deadline_s` is on the monotonic clock. A side that fails says so in its row, and so does the
    case where its inputs cannot be made."""
    base = {"op": case.op, "shape": case.shape, "dtype": str(case.dtype).removeprefix("torch."), "direction": "all", "side": "all"}
    if time.monotonic() > deadline_s:
        return [base | {"says": "left out: no time was left"}]
    rows: list[Row] = []
    if setup.with_compile:
        torch._dynamo.reset()
    try:
        for row in Measurement(case, setup, effort, deadline_s).rows():
            rows.append(row)
    except Exception as error:
        rows.append(base | {"says": in_words(error)})
    try:
        free_memory(setup.device)
    except RuntimeError as error:  # the device is lost, and so are the cases to come: each will say so
        rows.append(base | {"says": in_words(error)})
    return rows
