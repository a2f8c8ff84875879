"""Reads the files next to tokenizer.json in a Hugging Face folder: special tokens and the chat template.

    generation_config.json    eos_token_id (a number or a list), pad_token_id; falls back to config.json
    tokenizer_config.json     eos_token, bos_token, ... as text; chat_template
    special_tokens_map.json   tokens' texts that tokenizer_config.json leaves out
    chat_template.jinja       the chat template; takes precedence over tokenizer_config.json

Left out: add_bos_token and add_eos_token, because tokenizer.json itself defines the tokens added around a
text; additional_chat_templates/; named tokens that tokenizer.json does not contain (tokenizer.py refuses
those it needs).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reason_rl.records import ConfigError

CHAT_TEMPLATE_FILE = "chat_template.jinja"


@dataclass(frozen=True)
class SideFiles:
    folder: str = ""
    special: Mapping[str, str] = field(default_factory=dict)
    """{"bos_token": "<s>", ...}: the names that chat templates use."""
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    chat_template: str = ""


def read_side_files(folder: Path) -> SideFiles:
    # Merge each file with its fallback; a null counts as left out.
    config = _read_table(folder / "tokenizer_config.json")
    generation = _read_table(folder / "config.json") | {
        key: value for key, value in _read_table(folder / "generation_config.json").items() if value is not None}
    named = _read_table(folder / "special_tokens_map.json") | {key: value for key, value in config.items() if value is not None}

    # A token is its text, or a table with the text as its content.
    texts = {key: value["content"] if isinstance(value, Mapping) else value
             for key, value in named.items() if key.endswith("_token") and isinstance(value, str | Mapping)}
    pads = _ids(generation.get("pad_token_id"), "pad_token_id", folder)
    return SideFiles(
        str(folder), {key: text for key, text in texts.items() if isinstance(text, str)},
        _ids(generation.get("eos_token_id"), "eos_token_id", folder), pads[0] if pads else None,
        _chat_template(folder, config.get("chat_template")))


def _ids(value: object, key: str, folder: Path) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(one) is int and one >= 0 for one in ids):
        raise ConfigError(f"{folder}: {key} must be a token id or a list of them, got {value!r}")
    return tuple(ids)


def _chat_template(folder: Path, value: object) -> str:
    """The chat template's source, "" without one. value: chat_template in tokenizer_config.json."""
    path = folder / CHAT_TEMPLATE_FILE
    if path.is_file():
        return path.read_text(encoding="utf-8")

    # Of several named templates, take the default.
    if isinstance(value, list):
        value = {one.get("name"): one.get("template") for one in value if isinstance(one, dict)}
    if isinstance(value, dict):
        if "default" not in value:
            raise ConfigError(f"{folder}/tokenizer_config.json has several chat templates ({', '.join(map(str, value))}) and none "
                             f"is named 'default': put the one to use into {CHAT_TEMPLATE_FILE}")
        value = value["default"]
    if value is not None and not isinstance(value, str):
        raise ConfigError(f"{folder}/tokenizer_config.json: chat_template must be text or a list of named texts, got "
                         f"{type(value).__name__}")
    return value or ""


def _read_table(path: Path) -> dict[str, Any]:
    """The JSON file's object; {} if there is no such file."""
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is damaged: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is damaged: it must hold a JSON object, got {type(values).__name__}")
    return values
