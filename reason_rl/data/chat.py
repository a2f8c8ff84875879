"""A checkpoint's chat template: messages -> the text that its model was trained to answer.

A template is a Jinja program from whoever made the checkpoint, so it runs in jinja2's immutable sandbox, set up as Hugging Face
does: white space around blocks trimmed, break and continue in loops, `tojson` that escapes nothing, `raise_exception`,
`strftime_now`, `{% generation %}`, and the tokenizer's special tokens by name. What it raises is one clear error, and so are an
endless loop, a power and an endless text. The day that `strftime_now` tells is given, not the calendar's: a run's prompts follow
from its config.

Left out: tools, documents, several conversations at once; a bound on memory, and on what one line does within filters.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from types import FrameType
from typing import Any

import jinja2
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

MAX_LINES = 1_000_000
"""Lines of the compiled template that one render may take: about a second's work."""
MAX_CHARACTERS = 1_000_000
Message = Mapping[str, str]
"""{"role": "user", "content": "..."}"""


class ChatTemplate:
    def __init__(self, source: str, special: Mapping[str, str], folder: str = "") -> None:
        """special: {"bos_token": "<s>", ...}. folder: for errors."""
        self._special, self._folder = dict(special), folder
        environment = Sandbox(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"])
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"the chat template of {folder} is no template: line {error.lineno}: {error.message}") from error

    def render(self, messages: Sequence[Message], day: datetime, **variables: Any) -> str:
        """The messages as text, up to where the model's own answer begins. variables: switches of the template's, by name."""
        given = {**self._special, "messages": [dict(message) for message in messages], "tools": None, "documents": None,
                 "add_generation_prompt": True, "strftime_now": day.strftime, **variables}
        try:
            return _bounded(self._template.generate(given))
        except Exception as error:  # whatever a template may raise; all of it means that there is no prompt
            raise ValueError(f"the chat template of {self._folder} fails: {type(error).__name__}: {error}") from error


class Sandbox(ImmutableSandboxedEnvironment):
    """Without powers: one of them may take hours within a single line, where nothing counts."""

    intercepted_binops = frozenset(("**",))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        raise SecurityError(f"{operator} has no place in a chat template")


class Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks the model's own words for supervised training; the text stays as it is."""

    tags = {"generation"}  # noqa: RUF012 (an instance variable of jinja2's)

    def parse(self, parser: Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _bounded(pieces: Iterator[str]) -> str:
    """The pieces joined, drawn under a count of the lines that run: a loop without end ends at the same one on any machine."""
    lines = length = 0

    def count(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal lines
        lines += 1
        if lines > MAX_LINES:
            raise jinja2.TemplateRuntimeError(f"it does not end within {MAX_LINES:,} lines")
        return count if frame.f_code.co_filename == "<template>" else None

    before, parts = sys.gettrace(), []
    sys.settrace(count)
    try:
        for piece in pieces:
            parts.append(piece)
            length += len(piece)
            if length > MAX_CHARACTERS:
                raise jinja2.TemplateRuntimeError(f"it writes more than {MAX_CHARACTERS:,} characters")
    finally:
        sys.settrace(before)
    return "".join(parts)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: tuple[str, str] | None = None,
            sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
