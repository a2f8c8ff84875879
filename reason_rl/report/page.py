"""report.html: one page with a run's curves, key figures and sampled rollouts, a section for each stage.

    python -m reason_rl.report.page runs/program

The page can be written at any time: it leaves out whatever the run has not written yet. Text of a model is
data, never markup: the template embeds it as escaped JSON and the scripts set it with textContent. The page
loads nothing from the network, and its Content-Security-Policy forbids it. Layout and drawing are in
page.html.jinja, page.css, charts.js and viewer.js. Left out: comparison of runs (bench/plot.py, TensorBoard).
"""

from __future__ import annotations

import argparse
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from reason_rl.records import ConfigError
from reason_rl.report.files import Row, atomic_write_text, finite, read_jsonl
from reason_rl.report.log import METRICS, PHASES, TIMINGS, read_log, rollout_path, rollout_steps
from reason_rl.report.text import decimal, duration, percent, small

HERE = Path(__file__).parent
MAX_POINTS = 600
"""Per curve. Longer ones are thinned evenly; the first and the last point stay."""
MAX_TOKENS = 500_000
"""Tokens of rollouts on the page, about 10 MB. Past it, the later groups of each step are left out."""
UNSUPERVISED = ("pretrain", "grpo")
"""Kinds of stage. A run of these alone has no supervised step after its base model."""


def write_report(run_folder: str | Path) -> Path:
    """Writes run_folder/report.html from the run's files and returns its path."""
    folder = Path(run_folder)
    page = _environment().get_template("page.html.jinja").render(**report_context(folder))
    path = folder / "report.html"
    # A model's text may hold lone surrogates, which UTF-8 cannot encode.
    atomic_write_text(path, page.encode("utf-8", "backslashreplace").decode("utf-8"))
    return path


def report_context(folder: Path) -> dict[str, Any]:
    """The template's variables: the header's facts, the stages, and `data` for the scripts."""
    if not folder.is_dir():
        raise ConfigError(f"no run folder at {folder}")
    metrics, timings = read_log(folder, METRICS), read_log(folder, TIMINGS)
    if not metrics:
        raise ConfigError(f"nothing to report: {folder / METRICS} is missing or empty; a run writes it from its first step on")
    config = _text(folder / "config.toml")
    kinds = stage_kinds(config)

    # Stages in the order of the log; a stage of the recipe that has not begun has no line in it.
    names = list(dict.fromkeys(line["stage"] for line in metrics))
    stages = [stage_data(name, kinds.get(name, name), _of(metrics, name), _of(timings, name)) for name in names]
    pending = [name for name in kinds if name not in names]
    facts = _facts(metrics, _summary(folder))
    facts["learns_from_samples_alone"] = (any(stage["kind"] == "grpo" for stage in stages)
                                          and all(stage["kind"] in UNSUPERVISED for stage in stages))
    rollouts, num_left_out = read_rollouts(folder, names)
    return {
        "name": folder.resolve().name, "facts": facts, "tiles": _tiles(facts), "config": config, "num_left_out": num_left_out,
        "cards": [_card(stage) for stage in stages], "pending": pending,
        "data": finite({"run": folder.resolve().name, "stages": stages, "num_stages": len(stages) + len(pending),
                        "rollouts": rollouts}),
        # Our own files: the only text that autoescape skips.
        "css": Markup((HERE / "page.css").read_text(encoding="utf-8")),
        "scripts": [Markup((HERE / name).read_text(encoding="utf-8")) for name in ("charts.js", "viewer.js")],
    }


def stage_kinds(config: str) -> dict[str, str]:
    """{stage name: its kind}, in order, from the [[stage]] tables of config.toml; {} when it has none."""
    try:
        stages = tomllib.loads(config).get("stage", [])
    except tomllib.TOMLDecodeError:
        return {}
    tables = [table for table in stages if isinstance(table, dict)] if isinstance(stages, list) else []
    return {str(table.get("name") or table["kind"]): str(table["kind"]) for table in tables if "kind" in table}


def stage_data(name: str, kind: str, metrics: Sequence[Row], timings: Sequence[Row]) -> Row:
    """One stage for charts.js: columns of metrics and timings by phase, and pass@k before and after."""
    evals = [line for line in metrics if line["phase"] == "eval" and line.get("pass_at_k")]
    return {
        "name": name, "kind": kind,
        **{phase: columns([line for line in metrics if line["phase"] == phase]) for phase in PHASES},
        "timings": {phase: columns([line for line in timings if line["phase"] == phase]) for phase in PHASES},
        "pass_at_k": {"before": _pass_at_k([line for line in evals if line["step"] == 0][:1]),
                      "after": _pass_at_k([line for line in evals if line["step"] > 0][-1:])},
    }


def columns(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """Rows as {key: one number per row}, None if a row lacks the key; thinned to MAX_POINTS."""
    if len(rows) > MAX_POINTS:
        last = len(rows) - 1
        rows = [rows[round(i * last / (MAX_POINTS - 1))] for i in range(MAX_POINTS)]
    keys = {key: None for row in rows for key, value in row.items() if isinstance(value, int | float)}
    return {key: [_number(row.get(key)) for row in rows] for key in keys}


def read_rollouts(folder: Path, stages: Sequence[str], max_tokens: int = MAX_TOKENS) -> tuple[list[Row], int]:
    """([{"stage", "steps": [{"step", "groups": [{"prompt", "samples"}]}]}], completions left out)"""
    steps = [{"stage": stage, **_nested(step, read_jsonl(rollout_path(folder, stage, step)))}
             for stage in stages for step in rollout_steps(folder, stage)]
    # The first group of every step, then the second, and so on: so every step keeps some.
    kept: list[list[Row]] = [[] for _ in steps]
    spent = left_out = 0
    for rank in range(max((len(step["groups"]) for step in steps), default=0)):
        for step, groups in zip(steps, kept, strict=True):
            for group in step["groups"][rank:rank + 1]:
                spent += sum(len(sample["tokens"]) + 1 for sample in group["samples"])
                if spent <= max_tokens or not any(kept):
                    groups.append(group)
                else:
                    left_out += len(group["samples"])
    by_stage: dict[str, list[Row]] = {}
    for step, groups in zip(steps, kept, strict=True):
        if groups:
            by_stage.setdefault(step["stage"], []).append({"step": step["step"], "groups": groups})
    return [{"stage": stage, "steps": its_steps} for stage, its_steps in by_stage.items()], left_out


def _nested(step: int, rows: Sequence[Row]) -> Row:
    groups: dict[Any, Row] = {}
    for row in rows:
        group = groups.setdefault(row.get("group", 0), {
            **{key: row.get(key) for key in ("problem_id", "level", "prompt", "answer")}, "samples": []})
        tokens = [str(token) for token in row.get("tokens") or []]
        logprobs = [_number(value) for value in row.get("logprobs") or []]
        group["samples"].append({
            # Without tokens the text is shown as one token; logprobs of another length are not shown.
            "tokens": tokens or [str(row.get("text", ""))],
            "logprobs": [None if v is None else round(v, 5) for v in logprobs] if len(logprobs) == len(tokens) else [],
            "advantage": _number(row.get("advantage")), "reward": _number(row.get("reward")),
            "parts": row.get("parts") or {}, "is_graded": row.get("is_graded", True),
            "cause": str(row.get("cause") or ""), "finish_reason": row.get("finish_reason"),
        })
    return {"step": step, "groups": list(groups.values())}


def _of(lines: Sequence[Row], stage: str) -> list[Row]:
    return [line for line in lines if line["stage"] == stage]


def _number(value: Any) -> Any:
    return finite(value) if isinstance(value, int | float) else None


def _pass_at_k(lines: Sequence[Row]) -> dict[str, float]:
    """The pass@k of the one line, k ascending; {} without a line."""
    return {k: line["pass_at_k"][k] for line in lines for k in sorted(line["pass_at_k"], key=int)
            if _number(line["pass_at_k"][k]) is not None}


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _summary(folder: Path) -> Row:
    path = folder / "summary.json"
    if not path.is_file():
        return {}
    try:
        summary = finite(json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(summary, dict):
        raise ConfigError(f"{path}: expected a JSON object, got {type(summary).__name__}")
    return summary


def _facts(metrics: Sequence[Row], summary: Row) -> Row:
    """Base and final numbers: from summary.json, or, in an unfinished run, its first and last evaluation."""
    evals = [line for line in metrics if line["phase"] == "eval" and "accuracy" in line]
    base = evals[0] if evals and evals[0]["step"] == 0 else {}
    final = evals[-1] if evals and evals[-1] is not base else {}
    facts: Row = {"is_finished": bool(summary)}
    for key in ("accuracy", "mean_thinking_tokens", "thinks_share", "format_rate"):
        for end, line in (("base", base), ("final", final)):
            facts[f"{end}_{key}"] = _number(summary.get(f"{end}_{key}", line.get(key)))
    for key in ("wall_s", "seed", "max_abs_logprob_gap"):
        facts[key] = _number(summary.get(key))
    gaps = [line["max_abs_logprob_gap"] for line in metrics if _number(line.get("max_abs_logprob_gap")) is not None]
    if facts["max_abs_logprob_gap"] is None and gaps:
        facts["max_abs_logprob_gap"] = max(gaps)
    for key in ("accuracy_given_thought", "accuracy_given_none"):
        facts[f"base_{key}"] = _number(base.get(key))
    facts["base_pass_at_k"] = _pass_at_k([base] if base.get("pass_at_k") else [])
    return facts


def _tiles(facts: Row) -> list[Row]:
    """The header's key figures: {"label", "before", "value", "note"}; those without a value are left out."""
    before, after = facts["base_mean_thinking_tokens"], facts["final_mean_thinking_tokens"]
    growth = f"{after / before:.1f}× the base" if before and after is not None else ""
    tiles = [
        ("Held-out accuracy", percent(facts["base_accuracy"]), percent(facts["final_accuracy"]), "base → final policy"),
        ("Thinking tokens", decimal(before), decimal(after), growth),
        ("Samples that think", percent(facts["base_thinks_share"]), percent(facts["final_thinks_share"]), ""),
        ("Format kept", percent(facts["base_format_rate"]), percent(facts["final_format_rate"]), ""),
        ("Wall time", "", duration(facts["wall_s"]) if facts["wall_s"] is not None else "", "evaluations included"),
        ("Largest logprob gap", "", small(facts["max_abs_logprob_gap"]), "sampler against trainer, nats"),
    ]
    return [{"label": label, "before": first if value else "", "value": value or first, "note": note}
            for label, first, value, note in tiles if value or first]


def _card(stage: Mapping[str, Any]) -> Row:
    """A stage in the header: {"name", "kind", "steps", "figures": [(label, first, last)]}."""
    train, evals = stage["train"], stage["eval"]
    wanted = (("held-out accuracy", evals, "accuracy", percent), ("thinking tokens", evals, "mean_thinking_tokens", decimal),
              ("loss", {} if "reward" in train else train, "loss", lambda value: f"{value:.3f}"))
    figures = []
    for label, table, key, words in wanted:
        values = [value for value in table.get(key, []) if value is not None]
        if values:
            figures.append((label, words(values[0]) if len(values) > 1 else "", words(values[-1])))
    steps = [*train.get("step", []), *evals.get("step", [])]
    return {"name": stage["name"], "kind": stage["kind"], "steps": max(steps, default=0), "figures": figures}


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
