"""report.html: one self-contained page of a run's curves, its numbers, and a viewer of its sampled rollouts.

After the last step, or at any time: `python -m reason_rl.report.page runs/program`. It reads what the run wrote and
tolerates missing parts (an unfinished run, no rollouts, no summary). Texts of a model are data here, never markup: they
travel as escaped JSON and the page sets them with textContent. The page asks the network for nothing, and says so in a
Content-Security-Policy. Drawing lives beside this file: page.html.jinja, page.css, charts.js,
viewer.js. Left out: comparing runs (plot.py, TensorBoard).
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from reason_rl.report.log import METRICS, TIMINGS, finite, read_jsonl, rollout_path, rollout_steps
from reason_rl.report.terminal import duration

HERE = Path(__file__).parent
MAX_POINTS = 600
"""Per curve; longer ones (pretraining) are thinned evenly, first and last point kept."""
MAX_TOKENS = 500_000
"""Tokens of rollouts on the page, some 10 MB; past it the later groups of each step are left out, as the page says."""

Row = dict[str, Any]


def write_report(run_folder: str | Path) -> Path:
    """Builds run_folder/report.html from the run's files and returns its path."""
    folder = Path(run_folder)
    page = _environment().get_template("page.html.jinja").render(**report_context(folder))
    path = folder / "report.html"
    scratch = path.with_suffix(".tmp")
    scratch.write_text(page, encoding="utf-8", errors="backslashreplace")
    os.replace(scratch, path)
    return path


def report_context(folder: Path) -> dict[str, Any]:
    """What the template shows: the header's facts in words, and the data of curves and viewer as one mapping."""
    if not folder.is_dir():
        raise ValueError(f"no run folder at {folder}")
    metrics, timings = read_jsonl(folder / METRICS), read_jsonl(folder / TIMINGS)
    if not metrics:
        raise ValueError(f"nothing to report: {folder / METRICS} is missing or empty; a run writes it as it goes")
    phases = {phase: [row for row in metrics if row.get("phase") == phase] for phase in ("pretrain", "rl", "eval")}
    facts = _facts(phases, _summary(folder))
    rollouts, num_left_out = read_rollouts(folder)
    config = folder / "config.toml"
    data = {
        "run": folder.resolve().name,
        **{phase: columns(rows) for phase, rows in phases.items()},
        "timings": {phase: columns([row for row in timings if row.get("phase") == phase]) for phase in phases},
        "pass_at_k": {"base": facts["base_pass_at_k"], "final": facts["final_pass_at_k"]},
        "rollouts": rollouts,
    }
    return {
        "name": folder.resolve().name, "facts": facts, "tiles": _tiles(facts), "data": finite(data),
        "config": config.read_text(encoding="utf-8", errors="replace") if config.is_file() else "",
        "num_left_out": num_left_out,
        # Ours and trusted, taken in whole: autoescape is for everything that comes from a run.
        "css": Markup((HERE / "page.css").read_text()),
        "scripts": [Markup((HERE / name).read_text()) for name in ("charts.js", "viewer.js")],
    }


def columns(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """Rows as {key: one value a row}, numbers only, None where a row lacks the key; thinned to MAX_POINTS."""
    if len(rows) > MAX_POINTS:
        last = len(rows) - 1
        rows = [rows[round(i * last / (MAX_POINTS - 1))] for i in range(MAX_POINTS)]
    keys = {key: None for row in rows for key, value in row.items() if isinstance(value, int | float)}
    return {key: [_number(row.get(key)) for row in rows] for key in keys}


def read_rollouts(folder: Path, max_tokens: int = MAX_TOKENS) -> tuple[list[Row], int]:
    """(steps, number of completions left out); a step is {"step", "groups": [{"prompt", "samples": [...]}]}."""
    steps = [_nested(step, read_jsonl(rollout_path(folder, step))) for step in rollout_steps(folder)]
    steps = [step for step in steps if step["groups"]]
    kept: set[tuple[int, int]] = set()
    spent = left_out = 0
    widest = max((len(step["groups"]) for step in steps), default=0)
    for rank in range(widest):  # the first group of every step, then the second: no step goes empty before another
        for number, step in enumerate(steps):
            if rank < len(step["groups"]):
                samples = step["groups"][rank]["samples"]
                spent += sum(len(sample["tokens"]) + 1 for sample in samples)
                if spent <= max_tokens or not kept:
                    kept.add((number, rank))
                else:
                    left_out += len(samples)
    for number, step in enumerate(steps):
        step["groups"] = [group for rank, group in enumerate(step["groups"]) if (number, rank) in kept]
    return [step for step in steps if step["groups"]], left_out


def _nested(step: int, rows: Sequence[Row]) -> Row:
    groups: dict[Any, Row] = {}
    for row in rows:
        group = groups.setdefault(row.get("group", 0), {
            **{key: row.get(key) for key in ("problem_id", "level", "prompt", "answer")}, "samples": []})
        tokens = [str(token) for token in row.get("tokens") or []]
        logprobs = [_number(value) for value in row.get("logprobs") or []]
        group["samples"].append({
            # Without tokens the text stands as one; logprobs that do not match them are not shown.
            "tokens": tokens or [str(row.get("text", ""))],
            "logprobs": [None if v is None else round(v, 5) for v in logprobs] if len(logprobs) == len(tokens) else [],
            "advantage": _number(row.get("advantage")), "reward": _number(row.get("reward")),
            "parts": row.get("parts") or {}, "is_graded": row.get("is_graded", True),
            "cause": str(row.get("cause") or ""), "finish_reason": row.get("finish_reason"),
        })
    return {"step": step, "groups": list(groups.values())}


def _number(value: Any) -> Any:
    return finite(value) if isinstance(value, int | float) else None


def _summary(folder: Path) -> Row:
    path = folder / "summary.json"
    if not path.is_file():
        return {}
    try:
        summary = finite(json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(summary, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(summary).__name__}")
    return summary


def _facts(phases: Mapping[str, Sequence[Row]], summary: Row) -> Row:
    """Base and final numbers: from summary.json, else from the first and last evaluation so far."""
    evals = phases["eval"]
    base = evals[0] if evals and evals[0].get("step") == 0 else {}
    final = evals[-1] if evals and evals[-1].get("step", 0) > 0 else {}
    facts: Row = {"is_finished": bool(summary), "rl_steps": phases["rl"][-1].get("step") if phases["rl"] else 0}
    for key, in_eval in (("accuracy", "accuracy"), ("mean_thinking_tokens", "mean_thinking_tokens"),
                         ("thinks_share", "thinks_share"), ("format_rate", "format_rate")):
        for side, row in (("base", base), ("final", final)):
            facts[f"{side}_{key}"] = _number(summary.get(f"{side}_{key}", row.get(in_eval)))
    for key in ("wall_s", "seed", "max_abs_logprob_gap"):
        facts[key] = _number(summary.get(key))
    gaps = [row["max_abs_logprob_gap"] for row in phases["rl"] if _number(row.get("max_abs_logprob_gap")) is not None]
    if facts["max_abs_logprob_gap"] is None and gaps:
        facts["max_abs_logprob_gap"] = max(gaps)
    for key in ("accuracy_given_thought", "accuracy_given_none"):
        facts[f"base_{key}"] = _number(base.get(key))
    for side, row in (("base", base), ("final", final)):
        given = row.get("pass_at_k") or summary.get(f"{side}_pass_at_k") or {}
        facts[f"{side}_pass_at_k"] = {k: given[k] for k in sorted(given, key=int) if _number(given[k]) is not None}
    return facts


def _tiles(facts: Row) -> list[Row]:
    """The header's big numbers: {"label", "before", "value", "note"}; those without a value are left out."""
    before, after = facts["base_mean_thinking_tokens"], facts["final_mean_thinking_tokens"]
    growth = f"{after / before:.1f}× the base" if before and after is not None else ""
    tiles = [
        ("Held-out accuracy", percent(facts["base_accuracy"]), percent(facts["final_accuracy"]), "base → final policy"),
        ("Thinking tokens", decimal(before), decimal(after), growth),
        ("Share that thinks", percent(facts["base_thinks_share"]), percent(facts["final_thinks_share"]), ""),
        ("Format kept", percent(facts["base_format_rate"]), percent(facts["final_format_rate"]), ""),
        ("Wall time", "", duration(facts["wall_s"]) if facts["wall_s"] is not None else "", "evaluations included"),
        ("Largest logprob gap", "", small(facts["max_abs_logprob_gap"]), "sampler against trainer, nats"),
    ]
    return [{"label": label, "before": first if value else "", "value": value or first, "note": note}
            for label, first, value, note in tiles if value or first]


def percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def decimal(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def small(value: float | None) -> str:
    return "" if value is None else "0" if value == 0 else f"{value:.1e}"


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True)
    environment.filters["percent"] = percent
    # The filter `tojson` writes <, >, & and ' as \u003c..., so no text of a run can close the script element.
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    return environment


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m reason_rl.report.page", description="Write RUN/report.html.")
    parser.add_argument("run", help="a run's folder, e.g. runs/program")
    try:
        print(write_report(parser.parse_args(arguments).run))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
