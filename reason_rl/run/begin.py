"""Checks everything that can fail before work starts, then opens the run's folder and log.

A refused run writes no files. Left out: the decision to begin or to continue a run (folder.py).
"""

from __future__ import annotations

import dataclasses
import secrets
import shutil
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TextIO

import torch

from kernels.native import ISA, cpu_unsupported_reason
from reason_rl.config import Config, ConfigError, ModelConfig, table_of
from reason_rl.data import Problems, Tokenizer, load_problems, tokenizer_of
from reason_rl.model.hf_config import read_model_config
from reason_rl.model.weights import check_weights
from reason_rl.parallel.world import World
from reason_rl.report.files import atomic_write_text
from reason_rl.report.log import RunLog
from reason_rl.report.terminal import View
from reason_rl.run.folder import RunFolder, begin_folder
from reason_rl.run.loop import Run
from reason_rl.run.recipe import PlannedStage, key_of
from reason_rl.run.stage_folder import release, try_lock

LOCK_FILE = ".lock"
"""Held while a process works on the run."""
LEFT_OUT_FILE = "left_out.txt"
"""The rows of the task's files that were left out, with reasons."""


def begin_run(config: Config, recipe: list[PlannedStage], world: World, folder: RunFolder, view: View,
              should_stop: Callable[[], bool]) -> Run:
    """Checks the recipe, its stages and their problems, then opens the folder and the log -> the run."""
    # Checks, which write nothing.
    started_s = time.perf_counter()
    tokenizer = tokenizer_of_recipe(recipe)
    view.recipe([stage.name for stage in recipe])
    if config.engine.decoder == "native" and cpu_unsupported_reason(world.device):
        raise ConfigError(f"engine.decoder='native' cannot run here: {cpu_unsupported_reason(world.device)}")
    problems: dict[str, Problems] = {}
    lines = check_start(config, recipe, tokenizer)
    for stage in recipe:
        if stage.kind.uses_problems:
            problems[stage.name] = load_problems(stage.config, tokenizer)
        lines += stage.kind.check(stage.config, tokenizer, problems.get(stage.name))
    for line in dict.fromkeys([*lines, describe_machine(config, world)]):
        view.message(line)

    # The folder and the log.
    folder = with_keys(config, folder, recipe, problems, world, view)
    opened: list[tuple[RunLog, TextIO]] = []
    world.from_main(lambda: opened.append(_open(config, folder, problems)))  # rank 0 makes the folder
    log, lock = opened[0] if opened else (None, None)
    return Run(folder, recipe, world, tokenizer, problems, view, should_stop, log, lock,
               seconds={"start_s": time.perf_counter() - started_s})


def tokenizer_of_recipe(recipe: list[PlannedStage]) -> Tokenizer:
    """The one tokenizer of all stages: that of the model they begin with."""
    tokenizers = {stage.name: tokenizer_of(stage.config) for stage in recipe if stage.after is None}
    first, *others = tokenizers
    for name in others:
        if tokenizers[name].to_json() != tokenizers[first].to_json():
            raise ConfigError(f"stages {first!r} and {name!r} begin with different tokenizers, but a recipe has one")
    return tokenizers[first]


def check_start(config: Config, recipe: list[PlannedStage], tokenizer: Tokenizer) -> list[str]:
    """Checks the folders that stages start from: tokenizer and weights fit -> a line that lists ignored [model] keys."""
    # The checkpoints.
    for folder in dict.fromkeys(stage.config.model.init_from for stage in recipe if stage.after is None):
        if not folder:
            continue
        check_weights(Path(folder))
        _, vocab_size = read_model_config(Path(folder))
        if tokenizer.vocab_size > vocab_size:
            raise ConfigError(f"{folder}: its tokenizer has {tokenizer.vocab_size} tokens, its model only {vocab_size}")
    if not config.model.init_from:
        return []

    # Keys that were set and differ from its config.json.
    shape, _ = read_model_config(Path(config.model.init_from))
    pairs = {one.name: (getattr(config.model, one.name), getattr(shape, one.name))
             for one in fields(ModelConfig) if one.name != "init_from"}
    overridden = [f"model.{key} = {asked!r} (it has {there!r})" for key, (asked, there) in pairs.items()
                  if asked not in (there, getattr(ModelConfig(), key))]
    if not overridden:
        return []
    return [f"The model is {config.model.init_from}, and its config.json overrides these keys: {', '.join(overridden)}."]


def with_keys(config: Config, folder: RunFolder, recipe: list[PlannedStage], problems: dict[str, Problems], world: World,
              view: View) -> RunFolder:
    """The folder with its stages' keys: those that the run began with, or new ones. Equal on all ranks."""
    digest = "/".join(dict.fromkeys(one.digest for one in problems.values()))
    kernels = ISA or "reference ops"

    # A run that continues: the same problems, and the keys that it began with.
    if folder.is_begun:
        if folder.compute["problems"] != digest:
            raise ConfigError(f"{folder.path} was begun with other problems than {config.task.path} has now: a file, the "
                              "template or the tokenizer has changed. --resume never starts over in a new folder")
        if folder.compute["kernels"] != kernels:
            view.message(f"This run began with {folder.compute['kernels']} and continues with {kernels}: from here on, results "
                         "may differ in rounding from those of an uninterrupted run.")
        return folder

    # A new run: a key for each stage, which includes the key of the stage before it.
    dtype = str(world.dtype).removeprefix("torch.")
    keys: dict[str, str] = {}
    for stage in recipe:
        after_key = keys[stage.after.name] if stage.after else ""
        digest_of_stage = problems[stage.name].digest if stage.name in problems else ""
        keys[stage.name] = key_of(stage, f"{dtype} on {world.device.type}", digest_of_stage, after_key)
    if config.run.resume == "never":  # a new key, so that the last stage is not reused but trained
        keys[recipe[-1].name] += f"-{secrets.token_hex(4)}"
    compute = {"dtype": dtype, "kernels": kernels, "problems": digest}
    return dataclasses.replace(folder, compute=compute, stage_keys=world.gather(keys)[0])


def _open(config: Config, folder: RunFolder, problems: dict[str, Problems]) -> tuple[RunLog, TextIO]:
    """Locks the run, since two processes must not write one log. Opens the log, which may fail (a missing package), then writes
    config.toml: a folder with it holds a run."""
    # The lock and the log; a folder that this call made is removed if the log fails.
    was_there = folder.path.exists()
    lock = try_lock(folder.path / LOCK_FILE)
    if lock is None:
        raise ConfigError(f"another process is at work on the run in {folder.path}: wait for it, or give this one another --name")
    try:
        log = RunLog(folder.path, config.run.tensorboard, config.run.wandb_project, table_of(config))
    except BaseException:
        release(lock)
        if not was_there:
            shutil.rmtree(folder.path, ignore_errors=True)
        raise

    # config.toml, and the rows that were left out.
    begin_folder(folder, config)
    left_out = list(dict.fromkeys(line for one in problems.values() for line in one.left_out))
    if left_out:
        atomic_write_text(folder.path / LEFT_OUT_FILE, "\n".join(left_out) + "\n")
    return log, lock


def describe_machine(config: Config, world: World) -> str:
    """A line with device, kernels, dtype, processes and threads."""
    exact = {"on": "required", "off": "off"}.get(config.run.exact, "where the ops are batch-invariant")
    reason = cpu_unsupported_reason(world.device)
    kernels = f" ({ISA} kernels)" if not reason else ""
    if reason and world.device.type == "cpu":
        kernels = f" (reference ops; native ones: {reason})"
    return (f"On {world.device}{kernels}, {str(world.dtype).removeprefix('torch.')}, {world.size} process(es) of "
            f"{torch.get_num_threads()} CPU thread(s); exact logprobs {exact}.")
