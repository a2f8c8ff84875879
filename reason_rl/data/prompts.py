"""How a problem becomes a prompt: a template, which is a TOML file of a few lines, shipped in prompts/ or the user's own.

    use_chat_template = false    # true: prompt and examples go through the checkpoint's chat template, as turns of a chat
    system = ""                  # stands first; the system's message of a chat
    prompt = "{problem}"         # the text around the problem
    completion_prefix = ""       # what the completion begins with, such as "<think>": ends the prompt, and is graded with the rest;
                                 # a <think> that a chat template ends with is one without being named
    day = 2024-07-26             # what a chat template takes for today, so that prompts do not change with the calendar
    [variables]                  # switches of the chat template's own
    enable_thinking = true
    [[examples]]                 # worked ones before the problem, any number of them
    problem = "1 + 1"
    completion = "<think>1 + 1 = 2</think><answer>2</answer>"

All keys but `prompt` may be left out. A raw prompt is these texts put together as they stand; a line break after an opening
quotation in threes is TOML's and not the text's.
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
        """The prompt's text."""
        text = self._chat(problem, tokenizer) if self.use_chat_template else self._raw(problem)
        prefix = self.completion_prefix.strip()
        # A chat template may have opened the thought itself.
        is_there = self.use_chat_template and prefix and text.rstrip().endswith(prefix)
        return text if is_there else text + self.completion_prefix

    def prefix_of(self, text: str) -> str:
        """What of the filled prompt counts as the completion's beginning. Where the chat template opens the thought, that too: the
        completion could not have a whole one else."""
        is_open = self.use_chat_template and text.rstrip().endswith("<think>")
        return self.completion_prefix or ("<think>" if is_open else "")

    def encode(self, texts: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
        """The tokens of such texts: what opens a sequence is written by the chat template, else put there by the tokenizer."""
        return tokenizer.encode_batch(texts, are_prompts=not self.use_chat_template)

    def _raw(self, problem: str) -> str:
        worked = "".join(self._around(one["problem"]) + one["completion"] for one in self.examples)
        return self.system + worked + self._around(problem)

    def _chat(self, problem: str, tokenizer: Tokenizer) -> str:
        if tokenizer.chat is None:
            raise ConfigError(f"task.template = {self.name!r} goes through a chat template, but the checkpoint has none: no "
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
    """One of those shipped, or the file at a path that ends with .toml."""
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    if not path.is_file():
        shipped = ", ".join(sorted(one.stem for one in FOLDER.glob("*.toml")))
        raise ConfigError(f"task.template must be one of {shipped}, or the path of a .toml file, got {name!r}"
                          + ("" if path.parent == FOLDER else ", which is not there"))
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
            raise ConfigError(f"{path}: an example has a problem and a completion, both text, got {one!r}")
