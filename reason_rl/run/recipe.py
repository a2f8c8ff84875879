"""The stages of a run in order, and the key of each stage's output.

A key is a digest of everything that the output depends on: kind and sections of the stage, seed, dtype, the output that
it starts from, the user's files that its sections name, and the code that the stage lists. Runs with equal keys share an
output. A run that continues keeps the keys that it began with, even if files were edited since.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from reason_rl.config import Config, ConfigError, StageConfig, config_of_stage, table_of
from reason_rl.model.hf_config import read_model_config
from reason_rl.run.stage_folder import FINAL
from reason_rl.stages import STAGES, Stage

DIGEST_LENGTH = 12
SAMPLED_BLOCKS, BLOCK_BYTES = 16, 4096
"""The digest of a large file reads SAMPLED_BLOCKS evenly spaced blocks."""
CODE = {".py", ".toml", ".cpp", ".h", ".cu", ".cuh"}
PACKAGE = Path(__file__).resolve().parents[1]
FILE_KEYS = ("task.path", "task.heldout_path", "task.pass_rates", "task.template")
FOLDER_KEYS = ("reward.model",)
MODULE_KEYS = ("task.name", "reward.custom", "reward.judge", "loss.surrogate")
"""Keys that may name a file, or a "module:attribute", of the user's."""


@dataclass(frozen=True)
class PlannedStage:
    name: str
    kind: type[Stage]
    config: Config
    """The stage's config; [model] is that of the weights it starts from."""
    after: PlannedStage | None
    """The stage whose output it starts from; None: random weights, or model.init_from."""

    @property
    def offset(self) -> int:
        """Steps that the stages before it, along `after`, take on problems."""
        if self.after is None:
            return 0
        return self.after.offset + (self.after.kind.num_steps_of(self.after.config) if self.after.kind.uses_problems else 0)


def plan_recipe(config: Config) -> list[PlannedStage]:
    """The stages in order; raises ConfigError if a stage cannot start from the ones before it."""
    stages = config.stages or default_stages(config)
    planned: dict[str, PlannedStage] = {}
    for stage in stages:
        if stage.kind not in STAGES:
            raise ConfigError(f"stage {stage.name!r}: kind must be one of {', '.join(STAGES)}, got {stage.kind!r}")

        # The stage that it starts from.
        kind, own = STAGES[stage.kind], config_of_stage(config, stage)
        if stage.name == FINAL:
            raise ConfigError(f"a stage cannot be named {FINAL!r}: checkpoints/{FINAL} is the last stage's output")
        if stage.after and stage.after not in planned:
            raise ConfigError(f"stage {stage.name!r} comes after {stage.after!r}, but no earlier stage has that name; "
                              f"earlier stages: {', '.join(planned) or 'none'}")
        after = None
        if kind.starts_from_weights:
            own_model = stage.sections.get("model", {})
            if stage.after or not own_model.get("init_from"):
                after = planned[stage.after] if stage.after else next(reversed(planned.values()), None)
            if after is not None and own_model:
                raise ConfigError(f"stage {stage.name!r} keeps the model of stage {after.name!r}, whose weights it starts from: "
                                  f"its {', '.join(f'model.{key}' for key in own_model)} would have no effect")
            if after is None and not own.model.init_from:
                raise ConfigError(f"stage {stage.name!r} ({stage.kind}) starts from weights: put a stage before it, such as "
                                  "kind = \"pretrain\", or set model.init_from to a checkpoint folder")
        elif stage.after or own.model.init_from:
            raise ConfigError(f"stage {stage.name!r} ({stage.kind}) starts from random weights, so it takes neither after nor "
                              f"model.init_from; got after = {stage.after!r}, model.init_from = {own.model.init_from!r}")
        planned[stage.name] = PlannedStage(stage.name, kind, with_model(own, after), after)
    return list(planned.values())


def default_stages(config: Config) -> tuple[StageConfig, ...]:
    """R1-Zero: pretrain a base model, then RL. With model.init_from: only RL."""
    grpo = StageConfig("grpo", "grpo")
    return (grpo,) if config.model.init_from else (StageConfig("pretrain", "pretrain"), grpo)


def with_model(config: Config, after: PlannedStage | None) -> Config:
    """The config with the [model] of the weights that the stage starts from, if it starts from any."""
    if after is not None:
        return replace(config, model=after.config.model)
    if not config.model.init_from:
        return config
    shape, _ = read_model_config(Path(config.model.init_from))
    return replace(config, model=replace(shape, init_from=config.model.init_from))


def key_of(stage: PlannedStage, dtype: str, problems: str, after_key: str) -> str:
    """"<name>-<digest>": the folder of the stage's output."""
    config, sections = stage.config, table_of(stage.config)
    inputs = {
        "kind": stage.kind.kind, "sections": {name: sections[name] for name in stage.kind.sections}, "seed": config.run.seed,
        "is_exact": config.run.exact != "off", "dtype": dtype, "problems": problems,
        "start": after_key or (folder_digest(Path(config.model.init_from)) if config.model.init_from else ""),
        "files": {str(path): file_digest(path) for path in users_files(config, stage.kind.sections)},
        "code": {name: code_digest(name) for name in stage.kind.code}}
    text = json.dumps(inputs, sort_keys=True)
    return f"{stage.name}-{hashlib.sha256(text.encode()).hexdigest()[:DIGEST_LENGTH]}"


def code_digest(name: str) -> str:
    """Of one source file, or of all in a folder; `name` is a path in reason_rl or in the checkout."""
    path = PACKAGE / name if (PACKAGE / name).exists() else PACKAGE.parent / name
    return file_digest(path) if path.is_file() else folder_digest(path, CODE)


def users_files(config: Config, sections: Collection[str]) -> Iterator[Path]:
    """The files that these sections name: data, a template, a reward model; the source of a task, reward, judge or surrogate."""
    tables = table_of(config)
    for dotted in (*FILE_KEYS, *FOLDER_KEYS, *MODULE_KEYS):
        section, key = dotted.split(".")
        if section not in sections:
            continue
        value = str(tables[section][key])
        if dotted in FILE_KEYS and Path(value).is_file():
            yield Path(value)
        elif dotted in FOLDER_KEYS and value:
            yield from sorted(path for path in Path(value).rglob("*") if path.is_file())
        elif dotted in MODULE_KEYS and ":" in value:
            module = importlib.util.find_spec(value.partition(":")[0])
            if module is not None and module.origin:
                yield Path(module.origin)


def folder_digest(folder: Path, suffixes: Collection[str] = ()) -> str:
    """Of the files with one of these suffixes; of all without."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and (not suffixes or path.suffix in suffixes)):
        digest.update(f"{path.relative_to(folder)}:{file_digest(path)}\n".encode())
    return digest.hexdigest()[:DIGEST_LENGTH]


def file_digest(path: Path) -> str:
    """A digest of the size and of evenly spaced blocks: milliseconds even for a checkpoint of gigabytes."""
    size, digest = path.stat().st_size, hashlib.sha256()
    digest.update(str(size).encode())
    with path.open("rb") as file:
        if size <= SAMPLED_BLOCKS * BLOCK_BYTES:
            digest.update(file.read())
        else:
            for number in range(SAMPLED_BLOCKS):
                file.seek((size - BLOCK_BYTES) * number // (SAMPLED_BLOCKS - 1))
                digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()[:DIGEST_LENGTH]
