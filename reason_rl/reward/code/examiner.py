"""The examiner: runs a problem's tests, in a jail of its own, against a candidate that lives in another process.

The tests are ordinary Python (`assert f(2) == 4`). The names that they use and do not define stand for the candidate's: a call
travels to the candidate's process as plain values, and a plain value comes back (wire.py). So the candidate never sees the
tests, cannot touch `assert` or `==`, and cannot say that it passed. What a result that is no plain value compares equal to is
nothing: `Remote` refuses `==`, `!=`, order, truth and hashing.

Changes that a candidate makes to its arguments do not come back: functions are judged by what they return.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import socket
import sys
import types
from collections.abc import Sequence
from typing import Any, NoReturn

from .wire import decode, encode, receive, send


class Gone(BaseException):
    """The candidate is dead, or sends what is no message; no test's `except Exception` swallows it."""


class TestsError(ValueError):
    """The tests themselves cannot be run."""


class Candidate:
    """The channel, as seen by the tests."""

    def __init__(self, channel: socket.socket) -> None:
        self.channel = channel
        self.failure = ""
        """What the candidate last raised, or "gone"."""

    def ask(self, operation: str, *arguments: Any) -> Any:
        message = [operation, *(encode(argument, _number) for argument in arguments)]
        return self.answer(message)

    def answer(self, message: list[Any] | None = None) -> Any:
        """To one message, or (None) to its own source, which it has run at the start."""
        try:
            if message is not None:
                send(self.channel, message)
            kind, content = receive(self.channel)
            value = decode(content, lambda number: Remote(self, number)) if kind == "value" else None
            name = "" if kind == "value" else str(content)
        except Exception as error:  # whatever a hostile message brings about
            self.failure = "gone"
            raise Gone(f"{type(error).__name__}: {error}") from error
        if not name:
            return value
        self.failure = name
        return _raise(name)


class Remote:
    """An object of the candidate's that is no plain value."""

    def __init__(self, candidate: Candidate, number: int) -> None:
        object.__setattr__(self, "_candidate", candidate)
        object.__setattr__(self, "_number", int(number))

    def _ask(self, operation: str, *arguments: Any) -> Any:
        return object.__getattribute__(self, "_candidate").ask(operation, self, *arguments)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._ask("call", arguments, named)

    def __getattr__(self, name: str) -> Any:
        return self._ask("getattr", name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._ask("setattr", name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._ask("getitem", key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._ask("setitem", key, value)

    def __len__(self) -> int:
        return int(self._ask("len"))

    def __iter__(self) -> Any:
        return iter(self._ask("list"))

    def __next__(self) -> Any:
        return self._ask("next")

    def __str__(self) -> str:
        return str(self._ask("str"))

    def _refuse(self, *_: Any) -> NoReturn:
        raise TypeError("an object of the candidate's is no plain value: it cannot be compared")

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __bool__ = _refuse
    __hash__ = _refuse


def examine(channel: socket.socket, setup: str, tests: Sequence[str], is_partial: bool) -> dict[str, Any]:
    """{"passed": tests passed, "failure": of the first that did not} or {"broken": why no candidate could pass}."""
    candidate = Candidate(channel)
    passed, failure = 0, ""
    try:
        codes = [compile(source, f"test {i}", "exec", dont_inherit=True) for i, source in enumerate(tests)]
        names, modules = _free_names("\n".join([setup, *tests]))
        prologue = compile(setup, "setup", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return {"broken": f"{type(error).__name__}: {error}"}
    try:
        candidate.answer()
        namespace: dict[str, Any] = {"__name__": "tests", **{name: importlib.import_module(name) for name in modules}}
        namespace |= {name: candidate.ask("global", name) for name in names}
        exec(prologue, namespace)
        for code in codes:
            error_name = _run(code, namespace, candidate)
            passed += not error_name
            failure = failure or error_name
            if (failure and not is_partial) or candidate.failure == "gone":
                break
    except (Exception, Gone) as error:
        if not candidate.failure:
            return {"broken": f"setup: {type(error).__name__}: {error}"}
        return {"passed": 0, "failure": candidate.failure}
    return {"passed": passed, "failure": failure}


def _run(code: Any, namespace: dict[str, Any], candidate: Candidate) -> str:
    """The name of what failed; empty when the test passed."""
    candidate.failure = ""
    try:
        exec(code, namespace)
    except Gone:
        return "gone"
    except BaseException as error:
        return candidate.failure or type(error).__name__
    return "gone" if candidate.failure == "gone" else ""


def _free_names(source: str) -> tuple[list[str], list[str]]:
    """The names that are the candidate's, and the standard modules that the tests use without importing them.

    A builtin is the candidate's only where the tests call nothing else: `assert sum(10, 15) == 6` tests a function of that name;
    in `assert set(f(1)) == {2}` the word `set` must stay what it is.
    """
    tree = ast.parse(source)
    loaded = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)]
    owners = {node.value.id for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)}
    bound = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            bound |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            bound.add(node.name)
    free = list(dict.fromkeys(name for name in loaded if name not in bound and not hasattr(builtins, name)))
    modules = [name for name in free if name in owners and name in sys.stdlib_module_names]
    names = [name for name in free if name not in modules]
    called = [node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    return names or called[:1], modules


def _number(value: Any) -> int | str:
    """What stands for it in a message: the number that the candidate gave it, or a builtin's name."""
    if isinstance(value, Remote):
        number: int = object.__getattribute__(value, "_number")
        return number
    if isinstance(value, type | types.BuiltinFunctionType):
        name = value.__name__
        if getattr(builtins, name, None) is value:
            return name
    raise TypeError(f"a test passes plain values, builtins and the candidate's own objects, not {type(value).__name__}")


def _raise(name: str) -> NoReturn:
    """The builtin exception of that name, so that a test may expect it; RuntimeError for any other."""
    kind = getattr(builtins, name, RuntimeError)
    if not (isinstance(kind, type) and issubclass(kind, Exception)):
        kind = RuntimeError
    try:
        error = kind("raised by the candidate")
    except TypeError:
        error = RuntimeError(name)
    raise error
