"""Writes the measured times of rms_norm's implementations into docs/kernels.md, between its two marker comments.

    .venv/bin/python -m bench.rms_norm --json bench/results/rms_norm_cpu.json
    .venv/bin/python -m docs.ladder

tests/test_docs.py holds the page to the record.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE, RECORD = ROOT / "docs" / "kernels.md", ROOT / "bench" / "results" / "rms_norm_cpu.json"
BEGIN, END = "<!-- times: python -m docs.ladder -->\n", "<!-- end of times -->\n"
IMPLEMENTATIONS = ("reference", "native", "F.rms_norm")


def table(record: Mapping[str, Any]) -> str:
    """The record of `python -m bench.rms_norm` -> a sentence on the machine, then a line per case and implementation."""
    setting = record["setting"]
    found = {(row["shape"], row["dtype"], row["side"], row["direction"]): row
             for row in record["rows"] if row["op"] == "rms_norm" and "says" not in row}
    lines = [
        f"{setting['device_name']}, {setting['threads']} thread(s), torch {setting['torch']}, commit {setting['commit'][:12]}:", "",
        "| shape | dtype | implementation | forward | forward and backward | error of the values |", "|---|---|---|---|---|---|"]
    for shape, dtype in dict.fromkeys(key[:2] for key in found):
        for name in IMPLEMENTATIONS:
            if (shape, dtype, name, "full") not in found:
                raise ValueError(f"times of {', '.join(IMPLEMENTATIONS)} expected; {name} did not run at {shape} {dtype}")
            forward, full = (found[shape, dtype, name, direction] for direction in ("forward", "full"))
            times = (f"{row['median_s'] * 1e6:,.0f} us" for row in (forward, full))
            lines.append(f"| {shape} | {dtype} | {name} | {' | '.join(times)} | {forward['error']:.1e} |")
    return "\n".join(lines) + "\n"


def with_times(page: str, times: str) -> str:
    """The page with `times` between the markers."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + times + END + rest.split(END)[1]


def main() -> None:
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    PAGE.write_text(with_times(PAGE.read_text(encoding="utf-8"), table(record)), encoding="utf-8")


if __name__ == "__main__":
    main()
