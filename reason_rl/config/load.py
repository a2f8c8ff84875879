"""Reads a config: defaults < TOML < `--section.key=value` -> checked dataclasses; writes one as TOML."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from kernels.grpo_loss.spec import SpecError
from reason_rl.config.checks import check_config
from reason_rl.config.schema import Config, StageConfig
from reason_rl.records import ConfigError

SECTIONS = tuple(field.name for field in dataclasses.fields(Config) if field.metadata.get("is_section", True))
# --device cpu is short for --run.device=cpu, --seed 1 for --run.seed=1, ...
SHORTHANDS = {key: f"run.{key}" for key in ("name", "seed", "device", "dtype", "resume")}


def load_config(toml_path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """overrides: `--section.key=value` or `--stage.section.key=value` -> the checked config."""
    # The tables of the file, with the overrides.
    values = {} if toml_path is None else _read_toml(Path(toml_path))
    tables = values.pop("stage", [])
    stages = _stage_tables(tables)
    for override in overrides:
        path, text = _split_override(override)
        _override(values, stages, path, text)

    # The recipe's sections, then each stage's keys on top of them.
    config = _build(values)
    config = dataclasses.replace(config, stages=tuple(_build_stage(config, table) for table in stages))
    for stage in config.stages or (None,):
        check_config(config if stage is None else config_of_stage(config, stage))
    return config


def config_of_stage(config: Config, stage: StageConfig) -> Config:
    """The config of one stage: the recipe's sections, overridden by the stage's keys."""
    own = {name: dataclasses.replace(getattr(config, name), **keys) for name, keys in stage.sections.items()}
    return dataclasses.replace(config, **own, stages=())


def _read_toml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        known = sorted(str(p) for p in path.parent.glob("*.toml")) if path.parent.is_dir() else []
        raise ConfigError(f"no config file at {path}" + (f"; there are {', '.join(known)}" if known else ""))
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def _stage_tables(tables: Any) -> list[dict[str, Any]]:
    """The [[stage]] tables, each with a kind and a name that is unique in the recipe."""
    # Their type, and the keys that say which stage each is.
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise ConfigError(f"stages are written as [[stage]] tables, got stage = {tables!r}")
    stages = [dict(table) for table in tables]
    for number, stage in enumerate(stages, 1):
        if not isinstance(stage.get("kind"), str):
            raise ConfigError(f"[[stage]] number {number} needs a kind, such as kind = \"grpo\", got {stage.get('kind')!r}")
        stage.setdefault("name", stage["kind"])
        for key in ("name", "after"):
            if not re.fullmatch(r"[\w-]+", str(stage.get(key, "x"))):
                raise ConfigError(f"[[stage]] number {number}: {key} must be a word of letters, digits, - and _, "
                                  f"got {stage[key]!r}")

    # Unique names.
    names = [stage["name"] for stage in stages]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{names.count(name)} stages are named {name!r}: give each [[stage]] a unique name")
    return stages


def _override(values: dict[str, Any], stages: list[dict[str, Any]], path: list[str], text: str) -> None:
    """Sets a key from the command line. A key without a stage's name also replaces the stages' own values."""
    # stage.section.key
    if len(path) == 3:
        stage = next((stage for stage in stages if stage["name"] == path[0]), None)
        if stage is None:
            names = [stage["name"] for stage in stages]
            raise ConfigError(f"--{'.'.join(path)}: no stage is named {path[0]!r}" + (_nearest(path[0], names) if names else ""))
        if path[1] not in SECTIONS:
            raise ConfigError(f"--{'.'.join(path)}: unknown config section {path[1]!r}{_nearest(path[1], SECTIONS)}")
        _set(stage, path[1], path[2], text)
        return

    # section.key
    section, key = path
    _set(values, section, key, text)
    for stage in stages:
        if isinstance(stage.get(section), dict):
            stage[section].pop(key, None)


def _set(tables: dict[str, Any], section: str, key: str, text: str) -> None:
    given = tables.setdefault(section, {})
    if isinstance(given, dict):  # else _build refuses the section
        given[key] = text


def _build_stage(config: Config, table: dict[str, Any]) -> StageConfig:
    given = {key: value for key, value in table.items() if key not in ("kind", "name", "after")}
    try:
        built = _build(given, config)
    except ConfigError as error:
        raise ConfigError(f"stage {table['name']!r}: {error}") from error
    sections = {name: {key: getattr(getattr(built, name), key) for key in keys} for name, keys in given.items()}
    if "run" in sections:
        raise ConfigError(f"stage {table['name']!r}: [run] holds for the whole recipe, not for one stage: "
                          f"set {', '.join(f'run.{key}' for key in sections['run'])} at the top")
    return StageConfig(table["kind"], table["name"], table.get("after", ""), sections)


def parse_command_line(arguments: Sequence[str]) -> Config:
    """`[config.toml] [--section.key=value | --section.key value ...]` -> Config."""
    # One file, and overrides in either spelling.
    toml_path: str | None = None
    overrides: list[str] = []
    pending = list(arguments)
    while pending:
        argument = pending.pop(0)
        if not argument.startswith("--"):
            if toml_path is not None:
                raise ConfigError(f"one config file at most, got {toml_path} and {argument}")
            toml_path = argument
        elif "=" in argument:
            overrides.append(argument)
        elif pending and not pending[0].startswith("--"):
            overrides.append(f"{argument}={pending.pop(0)}")
        else:
            raise ConfigError(f"{argument} needs a value: {argument}=...")
    return load_config(toml_path, overrides)


def _split_override(override: str) -> tuple[list[str], str]:
    """`--rl.steps=10` -> (["rl", "steps"], "10"); `--base.rl.steps=10` -> (["base", "rl", "steps"], "10")."""
    name, equals, text = override.removeprefix("--").partition("=")
    *stage, section, key = SHORTHANDS.get(name, name).split(".") if "." in SHORTHANDS.get(name, name) else ("", "")
    if not equals or not section or len(stage) > 1:
        raise ConfigError(f"an override reads --section.key=value, got {override!r}" + _nearest(name, list(SHORTHANDS)))
    return [*stage, section.replace("-", "_"), key.replace("-", "_")], text


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}"


def _build(values: Mapping[str, Any], base: Config | None = None) -> Config:
    """`base` (default: all defaults) with the given keys, converted to the types of their fields."""
    base = base or Config()
    sections = {name: getattr(base, name) for name in SECTIONS}
    all_keys = [f"{s}.{key}" for s, v in sections.items() for key in keys_of(v)]
    for section, given in values.items():
        if section not in sections:
            raise ConfigError(f"unknown config section [{section}]{_nearest(section, list(sections))}")
        if not isinstance(given, Mapping):
            raise ConfigError(f"[{section}] must be a table of keys, got {given!r}{_nearest(section, all_keys)}")

        # Known keys only, then their values.
        hints = typing.get_type_hints(type(sections[section]))
        for key in given:
            if key not in keys_of(sections[section]):
                raise ConfigError(f"unknown config key {section}.{key}{_nearest(f'{section}.{key}', all_keys)}")
        converted = {key: _convert(f"{section}.{key}", value, hints[key]) for key, value in given.items()}
        try:
            sections[section] = dataclasses.replace(sections[section], **converted)
        except SpecError as error:
            raise ConfigError(str(error)) from error
    return dataclasses.replace(base, **sections)


def _convert(name: str, value: Any, hint: Any) -> Any:
    """A TOML value, or the text of a command-line override, as the field's type."""
    # Choices, and texts from the command line.
    if typing.get_origin(hint) is Literal:
        if value not in typing.get_args(hint):
            raise ConfigError(f"{name} must be one of {list(typing.get_args(hint))}, got {value!r}")
        return value
    if isinstance(hint, types.UnionType) or hint not in (bool, int, float, str):
        raise AssertionError(f"{name}: a config field is bool, int, float, str or Literal, not {hint}")
    if isinstance(value, str) and hint is not str:
        try:
            value = json.loads(value.lower() if hint is bool else value)
        except ValueError:
            raise ConfigError(f"{name} must be {hint.__name__}, got {value!r}") from None

    # A number may be written 1 for 1.0, or 1.0 for 1; every other type must match.
    if hint is float and type(value) is int:
        value = float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not hint:
        raise ConfigError(f"{name} must be {hint.__name__}, got {value!r}")
    if hint is float and not math.isfinite(value):
        raise ConfigError(f"{name} must be a finite number, got {value!r}")
    return value


def keys_of(section: Any) -> list[str]:
    """The config keys of a section: its fields, except those that are filled in at run time."""
    return [field.name for field in dataclasses.fields(section) if field.metadata.get("is_key", True)]


def table_of(config: Config) -> dict[str, dict[str, Any]]:
    """section -> key -> value"""
    return {name: {key: getattr(getattr(config, name), key) for key in keys_of(getattr(config, name))} for name in SECTIONS}


def dump_config(config: Config) -> str:
    """The resolved config as TOML; `load_config` reads it back to an equal value."""
    lines = []
    for section, values in table_of(config).items():
        lines.append(f"[{section}]")
        lines += [f"{key} = {_toml(value)}" for key, value in values.items()]
        lines.append("")
    for stage in config.stages:
        given = [key for key in ("kind", "name", "after") if getattr(stage, key)]
        lines += ["[[stage]]", *(f"{key} = {_toml(getattr(stage, key))}" for key in given)]
        for section, keys in stage.sections.items():
            lines += [f"[stage.{section}]", *(f"{key} = {_toml(value)}" for key, value in keys.items())]
        lines.append("")
    return "\n".join(lines)


def _toml(value: bool | int | float | str) -> str:
    """As JSON, which is TOML with two exceptions: TOML has no surrogate pairs, and escapes DEL."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def config_difference(old: Config, new: Config) -> list[str]:
    """Lines `section.key: old -> new` for each value that differs."""
    a, b = table_of(old), table_of(new)
    lines = [f"{s}.{k}: {a[s][k]!r} -> {b[s][k]!r}" for s in a for k in a[s] if a[s][k] != b[s][k]]
    if old.stages != new.stages:
        lines.append(f"stages: {_stages_in_words(old)} -> {_stages_in_words(new)}")
    return lines


def _stages_in_words(config: Config) -> str:
    def words(stage: StageConfig) -> str:
        own = [f"{section}.{key}={value!r}" for section, keys in stage.sections.items() for key, value in keys.items()]
        return f"{stage.name} ({', '.join([stage.kind, *own])})"

    return ", ".join(map(words, config.stages)) or "the default stages"
