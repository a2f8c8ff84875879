"""Draws held-out accuracy, thinking length and pass@k of several runs, as in the README.

    python -m bench.plot OUT.png RUN [RUN ...]          one run per seed
    python -m bench.plot --stage grpo-2 OUT.png RUN     this stage; default: the last one with evaluations

Each run is a line; nothing is averaged. Needs matplotlib (extra `bench`). Left out: other metrics of a run,
which its report shows (reason_rl/report/page.py).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter

from reason_rl.report.log import METRICS, read_log

COLOURS = ("#3454d1", "#d9730d", "#0f9b8e", "#b5399c", "#7a828e", "#a8860b")
STYLE: dict[Any, Any] = {
    "font.size": 10.5, "font.family": "sans-serif", "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": "#b9bec6", "axes.labelcolor": "#4b525c", "axes.titlesize": 11.5, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "axes.titlecolor": "#1d2129", "axes.grid": True, "axes.axisbelow": True,
    "grid.color": "#ececea", "xtick.color": "#6a727d", "ytick.color": "#6a727d", "xtick.major.size": 0,
    "ytick.major.size": 0, "legend.frameon": False, "lines.solid_capstyle": "round",
}


def plot_runs(run_folders: Sequence[str | Path], out_png: str | Path, stage: str = "") -> Path:
    """Draws one stage's evaluations of every run (`stage_evaluations`) into out_png and returns its path."""
    if not run_folders:
        raise ValueError("plot_runs needs at least one run folder, got none")
    runs = [(_label(Path(folder)), stage_evaluations(Path(folder), stage)) for folder in run_folders]

    # A panel per metric, a line per run.
    ks = sorted({int(k) for _, rows in runs for row in rows for k in row.get("pass_at_k") or {}})
    out = Path(out_png)
    out.parent.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        num_panels = 3 if ks else 2
        figure, axes = plt.subplots(1, num_panels, figsize=(4.3 * num_panels, 3.5), layout="constrained")
        for (label, rows), colour in zip(runs, _colours(len(runs))):
            _line(axes[0], rows, "accuracy", colour, label)
            _line(axes[1], rows, "mean_thinking_tokens", colour, label)
            if ks:
                _pass_at_k(axes[2], rows, colour)
        _dress(axes, ks)
        figure.savefig(out, dpi=160, facecolor="white")
        plt.close(figure)
    return out


def stage_evaluations(folder: Path, stage: str = "") -> list[dict[str, Any]]:
    """The evaluations of a stage, by step; default: of the last stage that has any."""
    lines = [line for line in read_log(folder, METRICS, stage=stage, phase="eval") if line.get("accuracy") is not None]
    if not lines:
        raise ValueError(f"nothing to draw: {folder / METRICS} holds no evaluation" + (f" of stage {stage!r}" if stage else ""))
    last = lines[-1]["stage"]
    return sorted((line for line in lines if line["stage"] == last), key=lambda line: line["step"])


def _label(folder: Path) -> str:
    """"seed 1", from the run's summary; the folder's name until it is written."""
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return folder.resolve().name
    seed = summary.get("seed") if isinstance(summary, dict) else None
    return folder.resolve().name if seed is None else f"seed {seed}"


def _colours(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _line(axis: Axes, rows: Sequence[dict[str, Any]], key: str, colour: str, label: str) -> None:
    points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    axis.plot([x for x, _ in points], [y for _, y in points], color=colour, label=label, linewidth=1.9,
              marker="o", markersize=4, markerfacecolor="white", markeredgewidth=1.5, clip_on=False)


def _pass_at_k(axis: Axes, rows: Sequence[dict[str, Any]], colour: str) -> None:
    """Dashed: the evaluation at step 0. Solid: the last later evaluation with pass@k."""
    given = [row for row in rows if row.get("pass_at_k")]
    chosen = [(row, "--") for row in given if row["step"] == 0] + [(row, "-") for row in given[-1:] if row["step"] > 0]
    for row, dashes in chosen:
        points = sorted((int(k), value) for k, value in row["pass_at_k"].items() if value is not None)
        axis.plot([k for k, _ in points], [value for _, value in points], color=colour, linestyle=dashes, linewidth=1.9,
                  marker="o", markersize=4, markerfacecolor="white", markeredgewidth=1.5, clip_on=False)


def _dress(axes: Sequence[Axes], ks: Sequence[int]) -> None:
    """Titles, ranges and legends. axes[2] exists only with `ks`."""
    # Accuracy and thinking tokens.
    for axis, title in zip(axes, ("Held-out accuracy", "Thinking tokens, mean")):
        axis.set(title=title, xlabel="step", ylim=(0, None))
        axis.set_xlim(left=0)
    axes[0].set_ylim(0, 1)
    axes[0].yaxis.set_major_formatter(PercentFormatter(1.0))
    axes[0].legend(loc="lower right")
    if not ks:
        return

    # pass@k.
    axes[2].set(title="pass@k", xlabel="k samples of each problem", xscale="log", ylim=(0, 1))
    axes[2].xaxis.set_major_locator(FixedLocator(ks))
    axes[2].xaxis.set_minor_locator(NullLocator())
    axes[2].set_xticklabels([str(k) for k in ks])
    axes[2].yaxis.set_major_formatter(PercentFormatter(1.0))
    for dashes, name in (("--", "before training"), ("-", "after training")):
        axes[2].plot([], [], color="#4b525c", linestyle=dashes, linewidth=1.9, label=name)
    axes[2].legend(loc="lower right")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description="Draw the evaluations of runs.")
    parser.add_argument("out", metavar="OUT.png")
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a run's folder, e.g. runs/program")
    parser.add_argument("--stage", default="", help="default: the last stage with evaluations")
    given = parser.parse_args(arguments)
    try:
        print(plot_runs(given.runs, given.out, given.stage))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
