"""What an evaluation is to measure: the command's options made whole, and everything checked that can fail before weights are read.

First half of `python -m reason_rl.eval` (eval.py). Config: --config, else that of the run whose folder the checkpoint is in, else
the defaults; the model's shape is always the checkpoint's own, and [sampling] is what the options say.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from reason_rl.config import Config, ConfigError, load_config
from reason_rl.data import Problems, Tokenizer, load_problems, problems_digest
from reason_rl.engine import check_fits
from reason_rl.eval.folder import fingerprint
from reason_rl.model.hf_config import read_model_config
from reason_rl.parallel.world import World
from reason_rl.records import Problem, SamplingParams
from reason_rl.reward import check_rewards
from reason_rl.run.folder import CONFIG_FILE

DEFAULT_MAX_TOKENS = 2048
"""Of a completion, where neither --max-tokens nor a config says it; less where the context leaves less."""


@dataclass(frozen=True)
class Plan:
    """What is to be measured, checked as far as it can be without the weights."""

    checkpoint: Path
    config: Config
    """With the checkpoint's own model, and its [sampling] as used here."""
    split: str
    num_samples: int
    ks: tuple[int, ...]
    seed: int
    out: Path
    tokenizer: Tokenizer
    problems: list[Problem]
    notes: tuple[str, ...]
    """What is worth saying of the task."""

    @property
    def sampling(self) -> SamplingParams:
        return replace(self.config.sampling, stop_ids=self.tokenizer.stop_ids)

    def setting(self, world: World) -> dict[str, Any]:
        """All that the rows follow from. The engine's sizes and --k are not among it."""
        config = self.config
        sections: dict[str, Any] = {"task": config.task, "reward": config.reward, "sampling": config.sampling}
        return {
            "checkpoint": str(self.checkpoint.resolve()), "weights": fingerprint(self.checkpoint), "split": self.split,
            "problems": len(self.problems), "prompts": problems_digest(self.problems), "samples": self.num_samples,
            "seed": self.seed, "device": world.device.type,
            "dtype": str(world.dtype).removeprefix("torch."), "exact": config.run.exact,
            **{f"{name}.{key}": value for name, values in sections.items() for key, value in asdict(values).items()}}


def make_plan(options: argparse.Namespace, overrides: list[str]) -> Plan:
    """Everything about the command that can fail, before weights are read."""
    checkpoint = Path(options.checkpoint)
    tokenizer, (model_config, vocab_size) = Tokenizer.load(checkpoint), read_model_config(checkpoint)
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(f"{checkpoint}: its tokenizer has {tokenizer.vocab_size} tokens, its model only {vocab_size}")
    ks = parse_ks(options.k, options.samples)
    config, has_file = resolve_config(options, overrides, checkpoint)
    config = replace(config, model=replace(model_config, init_from=config.model.init_from))
    task = load_problems(config, tokenizer)
    problems = problems_of(config, task, options.split, options.problems)
    if not problems:
        raise ValueError(f"task {config.task.name!r} has no problem for --split {options.split}")
    max_tokens = config.sampling.max_tokens if has_file else min(
        DEFAULT_MAX_TOKENS, model_config.max_position_embeddings - max(len(problem.prompt_ids) for problem in problems))
    sampling = SamplingParams(options.temperature, options.top_k, options.top_p, options.min_p,
                              max_tokens if options.max_tokens is None else options.max_tokens)  # checks its values
    config = replace(config, sampling=replace(
        config.sampling, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p, min_p=sampling.min_p,
        max_tokens=sampling.max_tokens))
    task.check(problems, config)
    check_fits(problems, sampling.max_tokens, model_config.max_position_embeddings, config.engine.num_blocks)
    notes = (*task.describe(), *check_rewards(config, problems[0]))
    out = Path(options.out) if options.out else default_folder(checkpoint, f"{config.task.name}-{options.split}")
    return Plan(checkpoint, config, options.split, options.samples, ks, options.seed, out, tokenizer, problems, notes)


def problems_of(config: Config, problems: Problems, split: str, count: int | None) -> list[Problem]:
    """The first `count` problems of the split, held-out ones in the order of a run's evaluations. None: all of a file; of a
    generated task as many as a run's last evaluation has."""
    if count is not None and count < 1:
        raise ValueError(f"--problems must be at least 1, got {count}")
    if problems.num_train is None:
        count = config.eval.final_problems if count is None else count
        if split == "all":
            raise ValueError(f"task {config.task.name!r} makes its problems without end: --split is heldout or rl")
        return problems.heldout(count) if split == "heldout" else problems.train(0, count)
    if split == "heldout":
        return problems.heldout(problems.num_heldout or 0 if count is None else count)
    listed = problems.all_known()[: None if split == "all" else problems.num_train]
    if count is not None and count > len(listed):
        raise ValueError(f"--problems {count} were asked for, but --split {split} of task {config.task.name!r} has {len(listed)}")
    random.Random(f"0/{split}").shuffle(listed)
    return listed[:count]


def parse_ks(text: str | None, num_samples: int) -> tuple[int, ...]:
    if num_samples < 1:
        raise ValueError(f"--samples must be at least 1, got {num_samples}")
    if text is None:
        return tuple(sorted({1, num_samples}))
    try:
        ks = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise ValueError(f"--k must be numbers like 1,4,16, got {text!r}") from None
    if ks[0] < 1 or ks[-1] > num_samples:
        raise ValueError(f"--k must be within 1..{num_samples} (--samples), got {text!r}")
    return tuple(ks)


def resolve_config(options: argparse.Namespace, overrides: Sequence[str], checkpoint: Path) -> tuple[Config, bool]:
    """-> (config, whether a file had a say in it): --config, else that of the run whose folder it is in, else the defaults."""
    run = run_of(checkpoint)
    path = options.config or (run / CONFIG_FILE if run else None)
    given = [f"--model.init_from={checkpoint}", *overrides]
    given += [f"--{key}={value}" for key, value in (
        ("task.name", options.task), ("run.device", options.device), ("run.dtype", options.dtype)) if value is not None]
    if path is None and not any(argument.startswith("--task.name=") for argument in given):
        raise ConfigError(f"{checkpoint} is in no run's folder, so say which problems: --task NAME or --config FILE")
    fixed = [argument for argument in overrides if argument.startswith("--sampling.")]
    if fixed:
        raise ConfigError(f"{fixed[0]}: here sampling is set by --temperature, --top-p, --top-k, --min-p and --max-tokens")
    config = load_config(path, given)
    # Only what says right or wrong: the rest of a reward is the training's.
    return replace(config, reward=replace(config.reward, custom="", judge="", model="")), path is not None


def run_of(checkpoint: Path) -> Path | None:
    """The run's folder that the checkpoint is in, as train.py lays it out."""
    folder = checkpoint.resolve().parent.parent
    return folder if checkpoint.resolve().parent.name == "checkpoints" and (folder / CONFIG_FILE).is_file() else None


def default_folder(checkpoint: Path, name: str) -> Path:
    return (run_of(checkpoint) or Path("runs")) / "evals" / f"{checkpoint.resolve().name}-{name}"
