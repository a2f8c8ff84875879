"""Renders a checkpoint's chat template: messages -> the prompt text that its model was trained on.

A template is a Jinja program that came with the checkpoint and is not trusted, so it runs in jinja2's
immutable sandbox. The sandbox is set up as in Hugging Face: blocks are trimmed of white space, loops have
break and continue, `tojson` escapes nothing, and `raise_exception`, `strftime_now`, `{% generation %}` and
the special tokens are defined. Any exception that the template raises becomes one ValueError, and so do an
endless loop, a power and an endless text. `strftime_now` formats a given day instead of today, so that
prompts depend on the config alone.

Left out: tools, documents, batches of conversations; limits on memory and on the time that one filter takes.
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

from reason_rl.records import ConfigError

MAX_LINES = 1_000_000
"""Limit on executed lines of the compiled template in one render: about a second's work."""
MAX_CHARACTERS = 1_000_000
Message = Mapping[str, str]
"""{"role": "user", "content": "..."}"""


class ChatTemplate:
    def __init__(self, source: str, special: Mapping[str, str], folder: str = "") -> None:
        """special: {"bos_token": "<s>", ...}. folder: named in errors."""
        self._special, self._folder = dict(special), folder
        environment = Sandbox(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"])
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"the chat template of {folder} is not a valid template: line {error.lineno}: "
                             f"{error.message}") from error

    def render(self, messages: Sequence[Message], day: datetime, **variables: Any) -> str:
        """The messages as text, up to the assistant's header. variables: the template's switches."""
        given = {**self._special, "messages": [dict(message) for message in messages], "tools": None, "documents": None,
                 "add_generation_prompt": True, "strftime_now": day.strftime, **variables}
        try:
            return _bounded(self._template.generate(given))
        except Exception as error:  # a template may raise anything
            raise ConfigError(f"the chat template of {self._folder} fails: {type(error).__name__}: {error}") from error


class Sandbox(ImmutableSandboxedEnvironment):
    """Refuses powers: one may take hours within a single line, which the line limit cannot stop."""

    intercepted_binops = frozenset(("**",))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        raise SecurityError(f"the operator {operator} is not allowed in a chat template")


class Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks text for supervised training; renders it unchanged."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it as an instance variable)

    def parse(self, parser: Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _bounded(chunks: Iterator[str]) -> str:
    """Joins a render's chunks. Limits executed lines, not seconds, to be the same on any machine."""
    lines = length = 0

    def count(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal lines
        lines += 1
        if lines > MAX_LINES:
            raise jinja2.TemplateRuntimeError(f"it does not end within {MAX_LINES:,} lines")
        return count if frame.f_code.co_filename == "<template>" else None

    # The template runs while the chunks are drawn; a trace function counts its lines.
    before, drawn = sys.gettrace(), []
    sys.settrace(count)
    try:
        for chunk in chunks:
            drawn.append(chunk)
            length += len(chunk)
            if length > MAX_CHARACTERS:
                raise jinja2.TemplateRuntimeError(f"it writes more than {MAX_CHARACTERS:,} characters")
    finally:
        sys.settrace(before)
    return "".join(drawn)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: tuple[str, str] | None = None,
            sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
