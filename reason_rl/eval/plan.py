"""The plan of an evaluation: the command's options resolved, and everything checked that can fail before weights are read.

The config is that of --config, else of the run whose folder contains the checkpoint, else the defaults. The checkpoint decides the
model's shape and the command's options decide the sampling. A key that would have no effect is refused.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from reason_rl.config import Config, ConfigError, config_of_stage, load_config, table_of
from reason_rl.data import Problems, Tokenizer, load_problems, problems_digest
from reason_rl.engine import check_fits
from reason_rl.eval.folder import fingerprint
from reason_rl.model.hf_config import read_model_config
from reason_rl.parallel.world import World
from reason_rl.records import Problem, SamplingParams
from reason_rl.reward import check_rewards

RUN_CONFIG_FILE = "config.toml"
"""In a run's folder."""
DEFAULT_MAX_TOKENS = 2048
"""Longest completion if neither --max-tokens nor a config file sets it; less if the model's context leaves less."""
EFFECTIVE_SECTIONS = ("task", "engine")
EFFECTIVE_KEYS = ("run.device", "run.dtype", "run.exact", "run.num_threads", "reward.verifier", "reward.math_deadline_s",
                  "reward.workers", "reward.max_queued")
OPTION_OF = {
    "sampling.temperature": "--temperature", "sampling.top_p": "--top-p", "sampling.top_k": "--top-k", "sampling.min_p": "--min-p",
    "sampling.max_tokens": "--max-tokens", "eval.problems": "--problems", "eval.final_problems": "--problems",
    "eval.samples": "--samples", "eval.final_samples": "--samples", "eval.pass_at_k": "--k", "eval.temperature": "--temperature",
    "run.seed": "--seed", "run.out_dir": "--out", "run.name": "--out",
}
"""The command's option instead of a config key that has no effect here."""


@dataclass(frozen=True)
class Plan:
    checkpoint: Path
    config: Config
    """[model] is the checkpoint's and [sampling] the options'."""
    split: str
    num_samples: int
    ks: tuple[int, ...]
    seed: int
    out: Path
    tokenizer: Tokenizer
    problems: list[Problem]
    notes: tuple[str, ...]
    """Lines to print about the task."""

    @property
    def sampling(self) -> SamplingParams:
        return replace(self.config.sampling, stop_ids=self.tokenizer.stop_ids)

    def setting(self, world: World) -> dict[str, Any]:
        """Everything that the rows depend on. They do not depend on the engine's sizes or on --k."""
        table = table_of(self.config)
        return {
            "checkpoint": str(self.checkpoint.resolve()), "weights": fingerprint(self.checkpoint), "split": self.split,
            "problems": len(self.problems), "prompts": problems_digest(self.problems), "samples": self.num_samples,
            "seed": self.seed, "device": world.device.type, "dtype": str(world.dtype).removeprefix("torch."),
            "exact": self.config.run.exact,
            **{f"{section}.{key}": value for section in ("task", "reward", "sampling") for key, value in table[section].items()}}


def make_plan(options: argparse.Namespace, overrides: Sequence[str]) -> Plan:
    """Raises ValueError for everything about the command that can fail before weights are read."""
    # The checkpoint and the options.
    checkpoint = Path(options.checkpoint)
    tokenizer, (model, vocab_size) = Tokenizer.load(checkpoint), read_model_config(checkpoint)
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(f"{checkpoint}: its tokenizer has {tokenizer.vocab_size} tokens, its model only {vocab_size}")
    ks = parse_ks(options.k, options.samples)
    path = options.config or config_of_run(checkpoint)
    config = resolve_config(path, options, overrides, checkpoint)
    config = replace(config, model=replace(model, init_from=config.model.init_from))

    # The problems, and how to sample them.
    source = load_problems(config, tokenizer)
    problems = select_problems(source, config, options.split, options.problems)
    max_tokens = config.sampling.max_tokens
    if options.max_tokens is not None:
        max_tokens = options.max_tokens
    elif path is None:
        room = model.max_position_embeddings - max(len(problem.prompt_ids) for problem in problems)
        max_tokens = max(1, min(DEFAULT_MAX_TOKENS, room))
    config = replace(config, sampling=SamplingParams(
        options.temperature, options.top_k, options.top_p, options.min_p, max_tokens))

    # Whether they fit, and whether they can be graded.
    source.check(problems, config)
    check_fits(problems, max_tokens, model.max_position_embeddings, config.engine.num_blocks)
    notes = (*source.describe(), *check_rewards(config, problems[0]))
    out = Path(options.out) if options.out else default_folder(checkpoint, f"{config.task.name}-{options.split}")
    return Plan(checkpoint, config, options.split, options.samples, ks, options.seed, out, tokenizer, problems, notes)


def select_problems(source: Problems, config: Config, split: str, count: int | None) -> list[Problem]:
    """The first `count` problems of the split; held-out problems are in the order of a run's own evaluations.

    count None: all problems of a file; of a generated task as many as in a run's last evaluation.
    """
    if count is not None and count < 1:
        raise ConfigError(f"--problems must be at least 1, got {count}")

    # A generated task has no end.
    if source.num_train is None or source.num_heldout is None:
        count = config.eval.final_problems if count is None else count
        if split == "all":
            raise ConfigError(f"task {config.task.name!r} generates its problems without end: --split must be heldout or rl")
        return source.heldout(count) if split == "heldout" else source.train(0, count)

    # A task from files: held-out problems as a run takes them, others in a shuffle with a fixed key.
    if split == "heldout":
        problems = source.heldout(source.num_heldout if count is None else count)
    else:
        problems = source.all_known()[: source.num_train if split == "rl" else None]
        if count is not None and count > len(problems):
            raise ConfigError(f"--problems {count}: --split {split} of task {config.task.name!r} has {len(problems)}")
        random.Random(f"0/{split}").shuffle(problems)
    if not problems:
        raise ConfigError(f"task {config.task.name!r} has no problem for --split {split}")
    return problems[:count]


def parse_ks(text: str | None, num_samples: int) -> tuple[int, ...]:
    if num_samples < 1:
        raise ConfigError(f"--samples must be at least 1, got {num_samples}")
    if text is None:
        return tuple(sorted({1, num_samples}))
    try:
        ks = sorted({int(number) for number in text.split(",")})
    except ValueError:
        raise ConfigError(f"--k must be numbers like 1,4,16, got {text!r}") from None
    if ks[0] < 1 or ks[-1] > num_samples:
        raise ConfigError(f"--k must be within 1..{num_samples} (--samples), got {text!r}")
    return tuple(ks)


def resolve_config(path: str | Path | None, options: argparse.Namespace, overrides: Sequence[str], checkpoint: Path) -> Config:
    """Defaults, then the TOML file at `path`, then the overrides and options.

    Of a recipe with stages: the keys of the stage that the checkpoint is named after, else of the last stage.
    """
    refuse_unused(overrides)
    given = [f"--model.init_from={checkpoint}", *overrides]
    given += [f"--{key}={value}" for key, value in (
        ("task.name", options.task), ("run.device", options.device), ("run.dtype", options.dtype)) if value is not None]
    if path is None and not any(argument.startswith("--task.name=") for argument in given):
        raise ConfigError(f"{checkpoint} is not in a run's folder: choose the problems by --task NAME or --config FILE")
    config = load_config(path, given)
    if config.stages:
        by_name = {stage.name: stage for stage in config.stages}
        config = config_of_stage(config, by_name.get(checkpoint.resolve().name, config.stages[-1]))
    # An evaluation measures right and wrong: neither custom rewards nor judges nor reward models are asked.
    return replace(config, reward=replace(config.reward, custom="", judge="", model=""))


def refuse_unused(overrides: Sequence[str]) -> None:
    """Raises for a config key that exists but has no effect here; `load_config` refuses keys that do not exist."""
    known = table_of(Config())
    for override in overrides:
        *_, section, key = ["", *override.removeprefix("--").partition("=")[0].replace("-", "_").split(".")]
        dotted = f"{section}.{key}"
        is_used = section in EFFECTIVE_SECTIONS or dotted in EFFECTIVE_KEYS or dotted.startswith("reward.code_")
        if key in known.get(section, ()) and not is_used:
            instead = f"; use {OPTION_OF[dotted]}" if dotted in OPTION_OF else ""
            raise ConfigError(f"{override} has no effect on an evaluation{instead}")


def run_of(checkpoint: Path) -> Path | None:
    """The run's folder if the checkpoint is in one: RUN/checkpoints/NAME, with RUN/config.toml."""
    folder = checkpoint.resolve().parent
    return folder.parent if folder.name == "checkpoints" and (folder.parent / RUN_CONFIG_FILE).is_file() else None


def config_of_run(checkpoint: Path) -> Path | None:
    run = run_of(checkpoint)
    return run / RUN_CONFIG_FILE if run else None


def default_folder(checkpoint: Path, name: str) -> Path:
    return (run_of(checkpoint) or Path("runs")) / "evals" / f"{checkpoint.resolve().name}-{name}"
