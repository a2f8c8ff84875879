"""Runs the benchmarks of all ops.

    python -m bench [op ...] [--json [FILE]] [--plot FILE.png] [--budget-s 440]

Each op runs in a new process, one after the other, so an op that fails, hangs or loses the device does not
affect the others. Each op gets an equal share of the remaining time. Whole models are timed by
bench.train_step and bench.rollout.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.harness import CHECKOUT, describe_setting
from bench.suite import options_from, options_of, write

OPS = ("group_advantage", "rms_norm", "swiglu", "rope", "grpo_loss", "linear", "sample", "moe", "attention", "linear_logprob",
       "linear_grpo_loss")
"""The slowest are last: they get the time that the others did not use."""
GRACE_S = 40.0
"""Seconds that an op may exceed its time, for its start and for its last case, before it is stopped."""


def run_op(op: str, budget_s: float, options: argparse.Namespace) -> dict[str, Any]:
    """bench.<op> in a new process -> its record; after a failure, the rows so far and one with the error."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "record.json"
        command = [sys.executable, "-m", f"bench.{op}", "--device", options.device, "--compile", options.compile,
                   "--warmup-ms", str(options.warmup_ms), "--rep-ms", str(options.rep_ms), "--budget-s", str(budget_s),
                   "--json", str(target), *(["--tiny"] if options.tiny else [])]

        # The process; its last line on stderr is the error.
        try:
            done = subprocess.run(command, cwd=CHECKOUT, stderr=subprocess.PIPE, text=True, timeout=budget_s + GRACE_S)
            last_line = (done.stderr.strip().splitlines() or ["no message"])[-1][:200]
            says = f"ended with {done.returncode}: {last_line}" if done.returncode else ""
        except subprocess.TimeoutExpired:
            says = f"stopped: it took more than {budget_s + GRACE_S:.0f} s"

        # Its record, or an empty one.
        record: dict[str, Any] = {"ceilings": {}, "rows": []}
        if target.is_file():
            record = json.loads(target.read_text(encoding="utf-8"))
    if says:
        print(f"{op}: {says}", flush=True)
        record["rows"].append({"op": op, "shape": "all", "dtype": "all", "direction": "all", "side": "all", "says": says})
    return record


def main(arguments: Sequence[str] | None = None) -> int:
    """-> 1 if an op failed as a whole, else 0."""
    # Options.
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("ops", nargs="*", metavar="op", help=f"of {', '.join(OPS)} (default: all)")
    options_of(parser, budget_s=440)
    options = options_from(parser, arguments)
    unknown = sorted(set(options.ops) - set(OPS))
    if unknown:
        parser.error(f"no benchmark of {', '.join(unknown)}; there are {', '.join(OPS)}")

    # Each op, then one record of all.
    started, ops = time.monotonic(), [op for op in OPS if op in options.ops or not options.ops]
    record: dict[str, Any] = {"bench": "kernels", "setting": describe_setting(options.device), "ceilings": {}, "rows": []}
    for number, op in enumerate(ops):
        print(f"\n== {op}", flush=True)
        left_s = max(0.0, options.budget_s - (time.monotonic() - started))
        found = run_op(op, left_s / (len(ops) - number), options)
        record["ceilings"] |= found["ceilings"]
        record["rows"] += found["rows"]
    record["wall_s"] = time.monotonic() - started
    print(f"\n{len(record['rows'])} rows in {record['wall_s']:.0f} s")
    write(record, options)
    return int(any(row["op"] in ops and row["shape"] == "all" for row in record["rows"]))


if __name__ == "__main__":
    sys.exit(main())
