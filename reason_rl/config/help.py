"""`train.py --help`: every config key with its default and its docstring."""

from __future__ import annotations

import ast
import inspect
import textwrap

from reason_rl.config.load import SHORTHANDS, table_of
from reason_rl.config.schema import Config

USAGE = """usage: torchrun train.py [CONFIG.toml] [--section.key=value ...]

Defaults < TOML < command line. Without arguments: the default run, which trains a tiny MoE to think on a CPU.
Shorthands: {shorthands}.
"""


def field_docs(kind: type) -> dict[str, str]:
    """Field name -> the docstring below it in the class's source, on one line; "" for a field without one."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(body, ast.ClassDef)
    docs = {}
    for statement, following in zip(body.body, [*body.body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            is_doc = (isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
                      and isinstance(following.value.value, str))
            docs[statement.target.id] = " ".join(following.value.value.split()) if is_doc else ""  # type: ignore[union-attr]
    return docs


def help_text() -> str:
    lines = [USAGE.format(shorthands=", ".join(f"--{short} for --{full}" for short, full in SHORTHANDS.items()))]
    for section, values in table_of(Config()).items():
        docs = field_docs(type(getattr(Config(), section)))
        lines.append(f"[{section}]")
        for name, value in values.items():
            lines.append(f"  --{section}.{name}={value}")
            lines += textwrap.wrap(docs[name], 104, initial_indent=" " * 8, subsequent_indent=" " * 8)
        lines.append("")
    return "\n".join(lines)
