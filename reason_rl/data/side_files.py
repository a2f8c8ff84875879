"""What a Hugging Face folder says of its tokenizer beside tokenizer.json: which tokens end, open and pad a text, and how a chat is
written.

    generation_config.json    eos_token_id (a number or a list), pad_token_id; config.json has what that file leaves out
    tokenizer_config.json     eos_token, bos_token, ... by their text; chat_template
    special_tokens_map.json   the tokens' texts that tokenizer_config.json leaves out
    chat_template.jinja       the chat template, before tokenizer_config.json's; additional_chat_templates/ is not read

Left out: add_bos_token and add_eos_token, for tokenizer.json itself says what is put around a text; tokens that these files name
and tokenizer.json does not have (tokenizer.py refuses those it needs).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHAT_TEMPLATE_FILE = "chat_template.jinja"


@dataclass(frozen=True)
class SideFiles:
    folder: str = ""
    special: Mapping[str, str] = field(default_factory=dict)
    """{"bos_token": "<s>", ...}: what a chat template knows them by."""
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    chat_template: str = ""


def read_side_files(folder: Path) -> SideFiles:
    config = _read_table(folder / "tokenizer_config.json")
    generation = _read_table(folder / "config.json") | {
        key: value for key, value in _read_table(folder / "generation_config.json").items() if value is not None}
    named = _read_table(folder / "special_tokens_map.json") | {key: value for key, value in config.items() if value is not None}
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
        raise ValueError(f"{folder}: {key} must be a token id or a list of them, got {value!r}")
    return tuple(ids)


def _chat_template(folder: Path, said: object) -> str:
    path = folder / CHAT_TEMPLATE_FILE
    if path.is_file():
        return path.read_text(encoding="utf-8")
    if isinstance(said, list):  # several by name
        said = {one.get("name"): one.get("template") for one in said if isinstance(one, dict)}
    if isinstance(said, dict):
        if "default" not in said:
            raise ValueError(f"{folder}/tokenizer_config.json has several chat templates ({', '.join(map(str, said))}) and none "
                             f"is named 'default': put the one to use into {CHAT_TEMPLATE_FILE}")
        said = said["default"]
    if said is not None and not isinstance(said, str):
        raise ValueError(f"{folder}/tokenizer_config.json: chat_template must be text or a list of named texts, got "
                         f"{type(said).__name__}")
    return said or ""


def _read_table(path: Path) -> dict[str, Any]:
    """The JSON file's table; empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} is damaged: it must hold a table, got {type(values).__name__}")
    return values
