"""`python -m reason_rl.explain runs/program/checkpoints/final`: one GRPO step of a checkpoint as explain.html.

It samples, grades, packs and updates as training does, with few problems, and changes nothing in the run. Every number on the page
is the step's own. `--section.key=value` sets any other key of the config (train.py --help).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from reason_rl.config import ConfigError
from reason_rl.explain.page import write_page
from reason_rl.explain.step import explain, prepare
from reason_rl.parallel.world import end_process

OPTIONS = {"prompts": "rl.prompts_per_step", "group": "rl.group_size", "max_tokens": "sampling.max_tokens", "seed": "run.seed"}
"""An option's name -> the config key that it sets."""


def parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """-> (options, `--section.key=value` overrides)"""
    parser = argparse.ArgumentParser(
        prog="python -m reason_rl.explain", allow_abbrev=False, usage="%(prog)s CHECKPOINT [options] [--section.key=value ...]",
        description="One GRPO step of a checkpoint as a page with all its numbers. The run is not changed.")
    parser.add_argument("checkpoint", help="a checkpoint folder, e.g. runs/program/checkpoints/final")
    parser.add_argument("--prompts", type=int, default=2, help="problems of the step (default 2)")
    parser.add_argument("--group", type=int, default=4, help="completions of each problem (default 4)")
    parser.add_argument("--max-tokens", type=int, help="longest completion; default: the config's")
    parser.add_argument("--seed", type=int, help="draws other problems and completions; default: the config's")
    parser.add_argument("--config", help="a TOML file with task, rewards and loss; default: the run's config.toml")
    parser.add_argument("--out", default="explain.html", help="the page to write (default explain.html)")
    options, rest = parser.parse_known_args(arguments)
    for argument in rest:
        if not argument.startswith("--") or "=" not in argument or "." not in argument.partition("=")[0]:
            parser.error(f"unknown argument {argument!r}; a config key is given as --section.key=value")
    return options, rest


def main(arguments: Sequence[str] | None = None) -> int:
    """Bad input is one line on stderr before any sampling; an error after that is a bug and keeps its traceback."""
    options, overrides = parse(arguments)
    checkpoint, out = Path(options.checkpoint), Path(options.out)
    given = {key: getattr(options, name) for name, key in OPTIONS.items()}
    try:
        if out.is_dir() or not out.parent.is_dir():
            raise ConfigError(f"--out must be a file in a folder that exists, got {out}")
        stage = prepare(checkpoint, options.config, [
            *overrides, *(f"--{key}={value}" for key, value in given.items() if value is not None)])
    except (ConfigError, OSError) as error:
        print(f"explain: {error}", file=sys.stderr)
        return 1
    explanation = explain(checkpoint, stage)
    write_page(explanation, out)
    print(out)
    if not stage.updates:
        print("No completion takes part, so the step has no update. Another --seed or a larger --group may have signal; "
              "--rl.dynamic_sampling=9 samples further problems, at most 9 times, until every group has.")
    return 0


if __name__ == "__main__":
    end_process(main())
