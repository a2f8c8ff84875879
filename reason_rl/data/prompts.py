"""Prompt templates: TOML files, shipped in prompts/ or the user's, that turn a problem into a prompt.

    use_chat_template = false    # true: prompt and examples are turns in the checkpoint's chat template
    system = ""                  # text before everything else; the system message of a chat
    prompt = "{problem}"         # the text around the problem
    completion_prefix = ""       # ends the prompt and is graded as the start of the completion, such as
                                 # "<think>"; a <think> at the end of a chat template counts without it
    day = 2024-07-26             # what a chat template gets as today, so that prompts do not change every day
    [variables]                  # switches of the chat template
    enable_thinking = true
    [[examples]]                 # worked examples before the problem, any number of them
    problem = "1 + 1"
    completion = "<think>1 + 1 = 2</think><answer>2</answer>"

Only `prompt` is required. A raw prompt is the concatenation of these texts, without separators. (TOML drops a
line break right after an opening triple quote.)
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import date, datetime, time
from pathlib import Path
from typing import Any

from reason_rl.config import ConfigError
from reason_rl.data.tokenizer import Tokenizer

FOLDER = Path(__file__).parent / "prompts"
SLOT = "{problem}"


@dataclass(frozen=True)
class PromptTemplate:
    prompt: str
    use_chat_template: bool = False
    system: str = ""
    completion_prefix: str = ""
    day: date = date(2024, 7, 26)
    variables: Mapping[str, Any] = field(default_factory=dict)
    examples: list[dict[str, str]] = field(default_factory=list)
    name: str = "plain"

    def fill(self, problem: str, tokenizer: Tokenizer) -> str:
        """The prompt as text."""
        text = self._chat(problem, tokenizer) if self.use_chat_template else self._raw(problem)
        prefix = self.completion_prefix.strip()
        # Some chat templates end with the prefix already.
        is_there = self.use_chat_template and prefix and text.rstrip().endswith(prefix)
        return text if is_there else text + self.completion_prefix

    def prefix_of(self, text: str) -> str:
        """The end of the filled prompt that is graded as the start of the completion. A <think> that the
        chat template ends with is included, because the completion would lack its opening tag without it."""
        is_open = self.use_chat_template and text.rstrip().endswith("<think>")
        return self.completion_prefix or ("<think>" if is_open else "")

    def encode(self, texts: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
        """Token ids of filled prompts. The tokenizer adds a BOS to raw ones; chat templates write theirs."""
        return tokenizer.encode_batch(texts, are_prompts=not self.use_chat_template)

    def _raw(self, problem: str) -> str:
        worked = "".join(self._around(one["problem"]) + one["completion"] for one in self.examples)
        return self.system + worked + self._around(problem)

    def _chat(self, problem: str, tokenizer: Tokenizer) -> str:
        if tokenizer.chat is None:
            raise ConfigError(f"task.template = {self.name!r} needs a chat template, but the checkpoint has none: no "
                              "chat_template.jinja, and no chat_template in tokenizer_config.json")
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for one in self.examples:
            messages += [{"role": "user", "content": self._around(one["problem"])},
                         {"role": "assistant", "content": one["completion"]}]
        messages.append({"role": "user", "content": self._around(problem)})
        return tokenizer.chat.render(messages, datetime.combine(self.day, time()), **self.variables)

    def _around(self, problem: str) -> str:
        return self.prompt.replace(SLOT, problem)


KINDS = {"prompt": str, "use_chat_template": bool, "system": str, "completion_prefix": str, "day": date, "variables": dict,
         "examples": list}


def load_template(name: str) -> PromptTemplate:
    """A shipped template by name, or the file at a path that ends with .toml."""
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    if not path.is_file():
        shipped = ", ".join(sorted(one.stem for one in FOLDER.glob("*.toml")))
        raise ConfigError(f"task.template must be one of {shipped}, or the path of a .toml file, got {name!r}"
                          + ("" if path.parent == FOLDER else ", which does not exist"))
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    _check(values, path)
    return PromptTemplate(**values, name=name)


def _check(values: Mapping[str, Any], path: Path) -> None:
    assert set(KINDS) == {one.name for one in fields(PromptTemplate)} - {"name"}
    for key, value in values.items():
        if key not in KINDS:
            raise ConfigError(f"{path}: unknown key {key!r}; known are {', '.join(KINDS)}")
        if type(value) is not KINDS[key]:
            raise ConfigError(f"{path}: {key} must be {KINDS[key].__name__}, got {value!r}")
    if values.get("prompt", "").count(SLOT) != 1:
        raise ConfigError(f"{path}: prompt must hold {SLOT} once, got {values.get('prompt')!r}")
    for one in values.get("examples", []):
        if not isinstance(one, dict) or {key: type(value) for key, value in one.items()} != {"problem": str, "completion": str}:
            raise ConfigError(f"{path}: an example must have problem and completion, both text, got {one!r}")
