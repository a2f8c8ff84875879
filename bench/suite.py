"""The command of a bench/<op>.py: measures its cases, prints tables, writes JSON, draws.

    python -m bench.rms_norm [--json [FILE]] [--plot FILE.png] [--device cpu] [--budget-s 120]

The ceilings, a large copy and a large product in each dtype, are measured in the same process. `percent` is
the time that the case's least work takes at its ceiling, over the measured time. It can exceed 100 if small
inputs stay in the cache. Needs only torch; --plot needs matplotlib.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch

from bench.cases import Case, Row, Setup, measure
from bench.harness import add_json_option, copy_gbytes, describe_setting, gemm_rates, write_json
from bench.timing import Effort
from kernels.__main__ import render

Ceilings = dict[str, float]
HEADER = ("side", "direction", "median", "p20", "p80", "memory", "error", "same bits", "reached", "percent")


def find_ceilings(device: torch.device) -> Ceilings:
    """{"copy": GB/s, "bfloat16": GFLOP/s, "float32": GFLOP/s}"""
    return {"copy": copy_gbytes(device)} | gemm_rates(device, 1024 if device.type == "cpu" else None)


def with_rates(row: Row, ceilings: Ceilings) -> Row:
    """Adds GB/s, TFLOP/s, the binding ceiling (memory or compute), and the percent of it."""
    if "says" in row:
        return row
    moving_s = row["bytes"] / ceilings["copy"] / 1e9
    computing_s = row["flops"] / ceilings["float32" if row["dtype"] == "float32" else "bfloat16"] / 1e9
    bound = "compute" if computing_s > moving_s else "memory"
    return row | {"bound": bound, "gb_s": row["bytes"] / row["median_s"] / 1e9, "tflop_s": row["flops"] / row["median_s"] / 1e12,
                  "percent": 100 * max(moving_s, computing_s) / row["median_s"]}


def in_time(seconds: float) -> str:
    return f"{seconds * 1e3:.3f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.2f} us"


def cells(row: Row) -> tuple[str, ...]:
    if "says" in row:
        return row["side"], row["direction"], row["says"], *[""] * 7
    reached = f"{row['gb_s']:.4g} GB/s"
    if row["bound"] == "compute":
        reached = f"{row['tflop_s']:.4g} TFLOP/s" if row["tflop_s"] >= 1 else f"{row['tflop_s'] * 1e3:.4g} GFLOP/s"
    return (row["side"], row["direction"], *(in_time(row[f"{key}_s"]) for key in ("median", "p20", "p80")),
            "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.1f} MiB",
            "-" if row["error"] is None else f"{row['error']:.1e}", "yes" if row["same_bits"] else "NO", reached,
            f"{row['percent']:.1f}%" + ("" if row["how"] in ("clock", "graph", "events") else " (no graph)"))


def show(rows: Sequence[Row]) -> None:
    """A table per case; a row with a reason or an error instead of numbers is a line below the table."""
    for (op, shape, dtype), group in groupby(rows, key=lambda row: (row["op"], row["shape"], row["dtype"])):
        measured, other = [], []
        for row in group:
            (other if "says" in row else measured).append(row)
        print(f"\n{op}  {shape}  {dtype}")
        if measured:
            print(render([HEADER, *map(cells, measured)]))
        for line in dict.fromkeys(f"{row['side']}: {row['says']}" for row in other):
            print(line)
    sys.stdout.flush()


def options_of(parser: argparse.ArgumentParser, budget_s: float) -> None:
    """The options of both bench.<op> and bench."""
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="only the smallest shapes, to test the benchmark itself")
    parser.add_argument("--compile", choices=["auto", "on", "off"], default="auto",
                        help="torch.compile of the reference; auto: on a GPU")
    parser.add_argument("--warmup-ms", type=float, default=100, help="untimed ms per side, shape and direction")
    parser.add_argument("--rep-ms", type=float, default=500, help="timed ms per side, shape and direction")
    parser.add_argument("--budget-s", type=float, default=budget_s,
                        help="seconds; cases that have not started by then are left out, each with a row that says so")
    parser.add_argument("--plot", metavar="FILE.png", help="draw a roofline, and bars with percents")
    add_json_option(parser)


def options_from(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    options = parser.parse_args(arguments)
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {options.device}, but torch {torch.__version__} sees no CUDA device")
    return options


def write(record: dict[str, Any], options: argparse.Namespace) -> None:
    if options.plot:
        from bench.drawing import draw  # needs matplotlib

        draw(record, options.plot)
    write_json(record, options.json)


def main(op: str, cases: Callable[[Setup], list[Case]], arguments: Sequence[str] | None = None) -> None:
    """Runs one bench/<op>.py as a command."""
    # Options, and the scale of the cases.
    parser = argparse.ArgumentParser(prog=f"python -m bench.{op}", description=f"Times `{op}`, torch and installed peers.")
    options_of(parser, budget_s=120)
    options = options_from(parser, arguments)
    started, device = time.monotonic(), torch.device(options.device)
    if device.type == "cpu":
        print("CPU implementations at small shapes" + ("" if torch.cuda.is_available() else ": no CUDA device"))
    has_compile = options.compile == "on" or (options.compile == "auto" and device.type == "cuda")
    setup = Setup(device, "tiny" if options.tiny else "numbers" if device.type == "cuda" else "small", has_compile)

    # The ceilings, then each case.
    ceilings = find_ceilings(device)
    rows: list[Row] = []
    record = {"bench": op, "setting": describe_setting(device), "ceilings": {op: ceilings}, "rows": rows}
    for case in cases(setup):
        found = [with_rates(row, ceilings) for row in measure(
            case, setup, Effort(options.warmup_ms / 1e3, options.rep_ms / 1e3), started + options.budget_s)]
        show(found)
        rows += found
        if options.json not in (None, "-"):
            write_json(record, options.json)  # so far, in case a later case ends the process

    # Summary and files.
    print(f"\nceilings: copy {ceilings['copy']:,.0f} GB/s, "
          + ", ".join(f"{name} {ceilings[name]:,.0f} GFLOP/s" for name in ("bfloat16", "float32")))
    write(record, options)
