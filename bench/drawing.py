"""`--plot`: a roofline of our implementations, and bars with every side's percent of its ceiling."""

from __future__ import annotations

from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from bench.cases import Row

MOST_BARS = 120
OURS = ("triton", "cuda", "native", "reference")
"""The roofline shows the first of these that ran."""


def of_ours(rows: list[Row]) -> list[Row]:
    """One row per case and direction: the first implementation in OURS that ran."""
    best: dict[tuple[str, ...], Row] = {}
    for row in sorted((r for r in rows if r["side"] in OURS), key=lambda r: OURS.index(r["side"]), reverse=True):
        best[row["op"], row["shape"], row["dtype"], row["direction"]] = row
    return list(best.values())


def roofline(axes: Axes, rows: list[Row], ceilings: dict[str, float]) -> None:
    """GFLOP/s over FLOPs per byte. Ops that only move bytes are at 1 FLOP per byte: their height is GB/s."""
    # The ceilings.
    intensities = [10.0**power for power in range(-1, 5)]
    for name in ("bfloat16", "float32"):
        axes.plot(intensities, [min(ceilings["copy"] * x, ceilings[name]) for x in intensities], label=f"ceiling, {name}", zorder=1)

    # A colour per op.
    for number, op in enumerate(sorted({row["op"] for row in rows})):
        mine = [row for row in rows if row["op"] == op]
        intensity = [max(row["flops"], row["bytes"]) / row["bytes"] for row in mine]
        heights = [x * row["gb_s"] for x, row in zip(intensity, mine, strict=True)]
        axes.scatter(intensity, heights, s=18, label=op, zorder=2, color=plt.get_cmap("tab20")(number))
    axes.set(xscale="log", yscale="log", xlabel="FLOPs per byte", ylabel="GFLOP/s (GB/s at 1)", title="Our kernels, and ceilings")
    axes.legend(fontsize=7, loc="lower right")


def bars(axes: Axes, rows: list[Row]) -> None:
    """The sides of each case in its last direction: full if it has gradients, else forward."""
    last = {(row["op"], row["shape"], row["dtype"]): row["direction"] for row in rows}
    shown = [row for row in rows if row["direction"] == last[row["op"], row["shape"], row["dtype"]]][:MOST_BARS]
    sides = sorted({row["side"] for row in shown})
    colours = {side: plt.get_cmap("tab20")(number % 20) for number, side in enumerate(sides)}
    places = range(len(shown), 0, -1)
    axes.barh(places, [row["percent"] for row in shown], color=[colours[row["side"]] for row in shown])
    axes.set_yticks(places, [f"{row['op']} {row['shape']} {row['direction']}: {row['side']}" for row in shown], fontsize=6)
    axes.set(xlabel="percent of the ceiling", title="Percent of the ceiling, by side")


def draw(record: dict[str, Any], path: str) -> None:
    """Draws the record that `--json` writes into a PNG."""
    # Measured rows; of several measurements of a ceiling the highest.
    rows = [row for row in record["rows"] if "says" not in row]
    names = {name for found in record["ceilings"].values() for name in found}
    ceilings = {name: max(found[name] for found in record["ceilings"].values()) for name in names}

    # Both panels.
    figure, (left, right) = plt.subplots(1, 2, figsize=(17, 3 + min(len(rows), MOST_BARS) * 0.16), layout="constrained")
    if rows:
        roofline(left, of_ours(rows), ceilings)
        bars(right, rows)

    # Title, file.
    setting = record["setting"]
    figure.suptitle(f"{setting['device_name']}, torch {setting['torch']}, commit {setting['commit']}", fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)
