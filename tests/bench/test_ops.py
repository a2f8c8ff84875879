"""The ops' benches: every op's tiny cases run on the CPU; a failure, a missing package or a timeout is
reported and stops no other case."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import __main__ as everything
from bench import cases, suite, timing
from bench.cases import Case, Measurement, Row, Setup, Side, error_of, measure
from bench.harness import CHECKOUT
from bench.timing import Call, Effort
from kernels.__main__ import import_ops
from kernels.dispatch import REGISTRY

CPU, F32 = torch.device("cpu"), torch.float32
TINY, QUICK = Setup(CPU, "tiny"), Effort(1e-4, 1e-3, 2)
CEILINGS = {"copy": 10.0, "bfloat16": 200.0, "float32": 100.0}
WHICH = {"op", "shape", "dtype", "direction", "side"}
SAYS = WHICH | {"says"}
NUMBERS = WHICH | {"median_s", "p20_s", "p80_s", "peak_bytes", "error", "same_bits", "how", "flops", "bytes", "bound", "gb_s",
                   "tflop_s", "percent"}
REFUSALS = ("not installed", "CUDA only", "bf16 only", "not for f32", "not in this torch")


def double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


def broken(x: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no such kernel\nand a long story")


def case(sides: dict[str, Side | str], **options: Any) -> Case:
    given: dict[str, Any] = {"make": lambda: {"x": torch.arange(1.0, 5.0)}, "exact": double, "wanted": ("x",),
                             "work": {"forward": (4, 32), "backward": (8, 32)}}
    return Case(op="double", shape="4", dtype=F32, sides=sides, **given | options)


# --- every op


@pytest.mark.parametrize("op", everything.OPS)
def test_an_ops_tiny_cases_run_on_the_cpu_and_their_rows_are_json(op: str):
    rows: list[Row] = []
    for each in importlib.import_module(f"bench.{op}").cases(TINY):
        rows += [suite.with_rates(row, CEILINGS) for row in measure(each, TINY, QUICK)]
    json.dumps(rows, allow_nan=False)
    for row in rows:
        assert set(row) == (SAYS if "says" in row else NUMBERS), row
        assert row.get("says", "not installed") in REFUSALS, row
    # 1e-6: f32 on sums of tens of terms; of tokens drawn, the share that float64 would not draw.
    assert all(row["error"] is None or row["error"] < 1e-6 for row in rows if "says" not in row)
    assert all(row["same_bits"] and row["p20_s"] <= row["median_s"] <= row["p80_s"] for row in rows if "says" not in row)


def test_every_op_that_computes_has_a_bench():
    import_ops()
    benched = {each.op for op in everything.OPS for each in importlib.import_module(f"bench.{op}").cases(TINY)}
    assert set(REGISTRY) - {"decode"} <= benched  # decode is all of them in one call: bench.rollout times it


# --- one case


def test_the_numbers_of_a_case_by_hand():
    rows = measure(case({"ours": Side(double)}), TINY, QUICK)
    assert [row["direction"] for row in rows] == ["forward", "backward", "full"]
    assert [(row["flops"], row["bytes"]) for row in rows] == [(4, 32), (8, 32), (12, 64)]
    row = suite.with_rates(rows[0] | {"median_s": 8e-9}, CEILINGS)  # 32 bytes at 10 GB/s take 3.2 ns, 4 FLOPs at 100 GFLOP/s 0.04
    assert (row["bound"], row["gb_s"], row["percent"]) == ("memory", pytest.approx(4.0), pytest.approx(40.0))
    row = suite.with_rates(rows[0] | {"median_s": 8e-9, "flops": 400}, CEILINGS)
    assert (row["bound"], row["tflop_s"], row["percent"]) == ("compute", pytest.approx(0.05), pytest.approx(50.0))


def test_a_failing_side_is_reported_and_the_others_run():
    rows = measure(case({"bad": Side(broken), "ours": Side(double), "gone": "not installed"}), TINY, QUICK)
    assert [(row["side"], row["direction"]) for row in rows] == [
        (side, way) for way in ("forward", "backward", "full") for side in ("bad", "ours", "gone")]
    said = {row["side"]: row["says"] for row in rows if "says" in row}
    assert said == {"bad": "RuntimeError: no such kernel", "gone": "not installed"}


def test_a_side_that_fails_only_while_it_is_timed_keeps_the_others():
    calls = []

    def tires(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return double(x) if len(calls) < 8 else broken(x)
    rows = measure(case({"tires": Side(tires), "ours": Side(double)}, wanted=()), TINY, QUICK)
    assert [(row["side"], "says" in row) for row in rows] == [("tires", True), ("ours", False)]


def test_a_failure_of_the_inputs_or_the_float64_result_is_reported():
    (row,) = measure(case({"ours": Side(double)}, make=lambda: broken(torch.zeros(1))), TINY, QUICK)
    assert row["says"] == "RuntimeError: no such kernel"
    first, *rest = measure(case({"ours": Side(double)}, exact=broken), TINY, QUICK)
    assert first["side"] == "float64" and [row["error"] for row in rest] == [None] * 3


def test_cases_not_started_in_time_are_left_out_and_reported():
    (row,) = measure(case({"ours": Side(double)}), TINY, QUICK, deadline_s=time.monotonic() - 1)
    assert row["says"] == "left out: no time was left"

    def slow(x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.05)
        return 2 * x
    rows = measure(case({"slow": Side(slow), "ours": Side(double)}, wanted=()), TINY, QUICK, deadline_s=time.monotonic() + 0.1)
    assert [row.get("says", "") for row in rows] == ["", "left out: no time was left"]


def test_errors_and_bits_are_computed_from_each_sides_results():
    def noisy(x: torch.Tensor) -> torch.Tensor:
        return 2 * x + torch.rand(()) * 0.2
    other_layout = Side(lambda y: (2 * y)[None], lambda inputs: {"y": inputs["x"]}, lambda out: out[0])
    noisy_row, prepared = measure(case({"noisy": Side(noisy), "prepared": other_layout}, wanted=()), TINY, QUICK)
    assert 0 < noisy_row["error"] < 0.1 and not noisy_row["same_bits"]
    assert prepared["error"] == 0 and prepared["same_bits"]
    wrong = measure(case({"wrong": Side(lambda x: 3 * x)}), TINY, QUICK)
    assert [row["error"] for row in wrong] == pytest.approx([0.5, 0.5, 0.5])
    half = measure(case({"half": Side(lambda x: 2 * x.detach() + (x - x.detach()))}), TINY, QUICK)  # right, its gradient half of it
    assert [row["error"] for row in half] == pytest.approx([0, 0.5, 0.5])


def test_error_by_hand():
    got, want = torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert error_of([got], [want]) == pytest.approx(0.1)
    assert error_of([got, torch.tensor([1, 2, 3, 4])], [want, torch.tensor([1, 2, 3, 5])]) == 0.25
    assert error_of([torch.tensor([torch.nan, 4.0]), got], [want, want]) is None
    assert error_of([torch.zeros(0)], [torch.zeros(0).double()]) == 0


def test_smaller_inputs_are_used_for_the_errors_alone():
    sizes = []

    def noted(x: torch.Tensor) -> torch.Tensor:
        sizes.append(len(x))
        return 2 * x
    measure(case({"ours": Side(noted)}, wanted=(), check=lambda: {"x": torch.ones(2)}), TINY, QUICK)
    assert sizes[0] == 2 and set(sizes[1:]) == {4}


def test_sides_take_turns():
    order = []

    class Timer:
        how = "clock"

        def __init__(self, name: str) -> None:
            self.name = name

        def round(self, seconds: float) -> list[float]:
            order.append(self.name)
            return [seconds]
    found = timing.take_turns({"a": Timer("a"), "b": Timer("b")}, Effort(0, 0.6, 3), {})
    assert order == ["a", "b"] * 3 and found == {"a": pytest.approx([0.2] * 3), "b": pytest.approx([0.2] * 3)}


def test_a_graph_cycles_through_inputs_of_three_cache_sizes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=60 << 20))
    assert [timing.num_copies(size, CPU) for size in (200 << 20, 100 << 20, 1 << 20, 10)] == [1, 2, 180, timing.MAX_COPIES]


class FakeCuda:
    """A fake GPU clock with graphs: a call takes the time it is given; a captured call takes it at replay."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s, self.captured, self.is_capturing, self.sync_mode = 0.0, [], False, "default"
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                self.at_s = 0.0

            def record(self) -> None:
                self.at_s = gpu.now_s

            def elapsed_time(self, end: Event) -> float:
                return (end.at_s - self.at_s) * 1e3

        class Graph:
            def __init__(self) -> None:
                self.calls_s: list[float] = []

            def replay(self) -> None:
                gpu.now_s += sum(self.calls_s)

        @contextlib.contextmanager
        def capture(graph: Graph, stream: object) -> Iterator[None]:
            gpu.is_capturing, gpu.captured = True, graph.calls_s
            try:
                yield
            finally:
                gpu.is_capturing = False

        stream = SimpleNamespace(wait_stream=lambda other: None)
        for name, value in {
            "Event": Event, "CUDAGraph": Graph, "graph": capture, "Stream": lambda: stream, "current_stream": lambda: stream,
            "stream": lambda stream: contextlib.nullcontext(), "synchronize": lambda: None, "empty_cache": lambda: None,
            "memory_allocated": lambda device: 100, "max_memory_allocated": lambda device: 164,
            "reset_peak_memory_stats": lambda device: None, "get_sync_debug_mode": lambda: self.sync_mode,
            "set_sync_debug_mode": lambda mode: setattr(self, "sync_mode", mode),
            "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=64),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def takes(self, seconds: float) -> None:
        if self.is_capturing:
            self.captured.append(seconds)
        else:
            self.now_s += seconds


def test_events_time_the_call_alone_and_graphs_share_a_replay_among_its_calls(monkeypatch: pytest.MonkeyPatch):
    gpu = FakeCuda(monkeypatch)
    again = []

    def call(seconds: float) -> Call:
        return Call(lambda state, twice: again.append(twice) or gpu.takes(state), before=lambda: gpu.takes(1.0) or seconds)
    events = timing.EventTimer(call(0.25), 0.0, torch.zeros(1))
    assert events.estimate_s == 0.25 and events.round(1.0) == [0.25] * 4 and not any(again)
    graph = timing.GraphTimer([call(0.25), call(0.75)], 0.0)
    assert graph.round(4.0) == [0.5] * 4 and again[-3:] == [True] * 3  # once to warm up, then the capture


@pytest.mark.parametrize(("seconds", "hows"), [
    (2**-10, ["events", "events"]), (2**-16, ["graph", "events; no graph: RuntimeError: sync"])])
def test_short_calls_are_timed_by_graph_if_they_can_be_captured(
        seconds: float, hows: list[str], monkeypatch: pytest.MonkeyPatch):
    gpu = FakeCuda(monkeypatch)

    def syncs(x: torch.Tensor) -> torch.Tensor:
        if gpu.sync_mode == "error":
            raise RuntimeError("sync")
        assert not gpu.is_capturing, "a call that waits for the device must not reach a capture"
        return gpu.takes(2 * seconds) or 2 * x
    sides = {"ours": Side(lambda x: gpu.takes(seconds) or 2 * x), "syncs": Side(syncs)}
    measurement = Measurement(case(sides, wanted=()), TINY, QUICK, math.inf)
    measurement.device = torch.device("cuda")
    monkeypatch.setattr(torch, "empty", lambda *size, dtype, device: torch.zeros(1))
    rows = list(measurement.rows())
    assert gpu.sync_mode == "default"
    assert [row["how"] for row in rows] == hows and [row["peak_bytes"] for row in rows] == [64, 64]
    assert [row["median_s"] for row in rows] == pytest.approx([seconds, 2 * seconds])


def test_torch_compile_of_the_reference_is_a_side_on_request(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "compile", lambda call, dynamic: call)
    assert set(Setup(CPU, "tiny", with_compile=True).compiled(double)) == {cases.COMPILED} and TINY.compiled(double) == {}


# --- the commands


def test_a_command_prints_a_table_and_writes_what_it_measured(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(suite, "find_ceilings", lambda device: CEILINGS)
    target, picture = tmp_path / "r.json", tmp_path / "r.png"
    suite.main("double", lambda setup: [case({"ours": Side(double), "bad": Side(broken)})], [
        "--device", "cpu", "--tiny", "--warmup-ms", "0", "--rep-ms", "1", "--json", str(target), "--plot", str(picture)])
    record = json.loads(target.read_text())
    assert record["bench"] == "double" and record["ceilings"] == {"double": CEILINGS} and len(record["rows"]) == 6
    assert record["setting"]["device"] == "cpu" and picture.read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert shown.count("ours  forward") == 1 and "bad: RuntimeError: no such kernel" in shown and "ceilings: copy 10 GB/s" in shown


def test_ceilings_are_measured(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(suite, "copy_gbytes", lambda device: 7.0)
    monkeypatch.setattr(suite, "gemm_rates", lambda device, size: {"float32": float(size), "bfloat16": 2.0})
    assert suite.find_ceilings(CPU) == {"copy": 7.0, "float32": 1024.0, "bfloat16": 2.0}


def test_all_ops_go_on_past_one_that_fails_and_share_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    given = {}

    def run(command: list[str], **options: Any) -> Any:
        op, target = command[2].removeprefix("bench."), Path(command[command.index("--json") + 1])
        given[op] = float(command[command.index("--budget-s") + 1])
        rows = [{"op": op, "shape": "4", "dtype": "float32", "direction": "forward", "side": "ours", "says": "quick"}]
        target.write_text(json.dumps({"ceilings": {op: CEILINGS}, "rows": rows}))
        if op == "swiglu":
            raise subprocess.TimeoutExpired(command, 1.0)
        return SimpleNamespace(returncode=int(op == "rope"), stderr="Traceback\nMemoryError: no room\n")
    monkeypatch.setattr(everything.subprocess, "run", run)
    monkeypatch.setattr(everything, "describe_setting", lambda device: {"device": "cpu"})
    target = tmp_path / "all.json"
    assert everything.main(["--device", "cpu", "--budget-s", "110", "--json", str(target)]) == 1
    rows = json.loads(target.read_text())["rows"]
    assert [row["op"] for row in rows if row["says"] == "quick"] == list(everything.OPS)
    assert {row["op"]: row["says"] for row in rows if row["shape"] == "all"} == {
        "rope": "ended with 1: MemoryError: no room", "swiglu": f"stopped: it took more than {110 / 9 + everything.GRACE_S:.0f} s"}
    assert given[everything.OPS[0]] == pytest.approx(10, abs=1) and given[everything.OPS[-1]] == pytest.approx(110, abs=5)
    with pytest.raises(SystemExit):
        everything.main(["reluu"])


def test_an_op_runs_with_torch_alone_from_a_bare_checkout(tmp_path: Path):
    code = ("import sys\nfor name in ('rich', 'numpy', 'matplotlib', 'safetensors', 'tokenizers'): sys.modules[name] = None\n"
            "from bench import suite, swiglu\nsuite.find_ceilings = lambda device: {'copy': 1., 'bfloat16': 1., 'float32': 1.}\n"
            "suite.main('swiglu', swiglu.cases, ['--device', 'cpu', '--tiny', '--rep-ms', '1', '--warmup-ms', '0', '--json'])")
    done = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert any(row["side"] == "reference" and row["error"] < 1e-6 for row in json.loads(done.stdout.splitlines()[-1])["rows"])


def test_a_missing_device_is_refused(capsys: pytest.CaptureFixture[str]):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit):
        suite.main("double", lambda setup: [], ["--device", "cuda"])
    assert "sees no CUDA device" in capsys.readouterr().err
