"""Reads a config: defaults < TOML < `--section.key=value`, as checked frozen dataclasses; and writes one back."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from reason_rl.config.checks import ConfigError, check_config
from reason_rl.config.schema import Config

# Shorthands that every trainer has: --device cpu, --dtype float32, --seed 1, ... stand for --run.device=cpu, ...
SHORTHANDS = {key: f"run.{key}" for key in ("name", "seed", "device", "dtype", "resume")}


def load_config(toml_path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Defaults, then the TOML file, then `--section.key=value` strings, checked as a whole."""
    values: dict[str, dict[str, Any]] = {}
    if toml_path is not None:
        path = Path(toml_path)
        if not path.is_file():
            known = sorted(str(p) for p in path.parent.glob("*.toml")) if path.parent.is_dir() else []
            raise ConfigError(f"no config file at {path}" + (f"; there are {', '.join(known)}" if known else ""))
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not valid TOML: {error}") from error
    for override in overrides:
        dotted, text = _split_override(override)
        section, _, key = dotted.partition(".")
        given = values.setdefault(section, {})
        if isinstance(given, dict):  # else _build refuses it in its own words
            given[key] = text
    config = _build(values)
    check_config(config)
    return config


def parse_command_line(arguments: Sequence[str]) -> Config:
    """`[config.toml] [--section.key=value | --section.key value ...]` -> Config."""
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


def _split_override(override: str) -> tuple[str, str]:
    name, equals, text = override.removeprefix("--").partition("=")
    name = SHORTHANDS.get(name, name.replace("-", "_"))
    if not equals or "." not in name:
        raise ConfigError(f"an override reads --section.key=value, got {override!r}" + _nearest(name, list(SHORTHANDS)))
    return name, text


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}"


def _build(values: Mapping[str, Any]) -> Config:
    default = Config()
    sections = {f.name: getattr(default, f.name) for f in dataclasses.fields(Config)}
    all_keys = [f"{s}.{key}" for s, v in sections.items() for key in keys_of(v)]
    for section, given in values.items():
        if section not in sections:
            raise ConfigError(f"unknown config section [{section}]{_nearest(section, list(sections))}")
        if not isinstance(given, Mapping):
            raise ConfigError(f"[{section}] must be a table of keys, got {given!r}{_nearest(section, all_keys)}")
        hints = typing.get_type_hints(type(sections[section]))
        for key in given:
            if key not in keys_of(sections[section]):
                raise ConfigError(f"unknown config key {section}.{key}{_nearest(f'{section}.{key}', all_keys)}")
        converted = {key: _convert(f"{section}.{key}", value, hints[key]) for key, value in given.items()}
        try:
            sections[section] = dataclasses.replace(sections[section], **converted)
        except ValueError as error:
            raise ConfigError(str(error)) from error
    return Config(**sections)


def _convert(name: str, value: Any, hint: Any) -> Any:
    """A TOML value, or the text of a command-line override, as the field's type."""
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
    """The config keys of a section: its fields, but for those that are filled in at run time."""
    return [field.name for field in dataclasses.fields(section) if field.metadata.get("is_key", True)]


def table_of(config: Config) -> dict[str, dict[str, Any]]:
    """section -> key -> value"""
    sections = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {name: {key: getattr(section, key) for key in keys_of(section)} for name, section in sections.items()}


def dump_config(config: Config) -> str:
    """The resolved config as TOML; `load_config` reads it back to an equal value."""
    lines = []
    for section, values in table_of(config).items():
        lines.append(f"[{section}]")
        lines += [f"{key} = {_toml(value)}" for key, value in values.items()]
        lines.append("")
    return "\n".join(lines)


def _toml(value: bool | int | float | str) -> str:
    """JSON's form is TOML's too, but for two points: TOML has no surrogate pairs, and wants DEL escaped."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def config_difference(old: Config, new: Config) -> list[str]:
    """Lines `section.key: old -> new` for each value that differs."""
    a, b = table_of(old), table_of(new)
    return [f"{s}.{k}: {a[s][k]!r} -> {b[s][k]!r}" for s in a for k in a[s] if a[s][k] != b[s][k]]
