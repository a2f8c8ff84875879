"""The examiner: runs a problem's tests, in a jail of its own, against a candidate that lives in another process.

The tests are ordinary Python (`assert f(2) == 4`). The names in them that are the candidate's (names.py) are asked for: a call
travels to the candidate's process as plain values, and a plain value comes back (wire.py). So the candidate never sees the
tests, cannot touch `assert` or `==`, and cannot say that it passed. What a result that is no plain value compares equal to is
nothing: `Remote` refuses `==`, `!=`, order, truth and hashing.

Changes that a candidate makes to its arguments do not come back: functions are judged by what they return. What no program could
pass (a function as an argument, arguments beyond a message's size, a module that is not here) is the tests' fault, "broken".
"""

from __future__ import annotations

import builtins
import importlib
import json
import socket
import types
from collections.abc import Mapping
from typing import Any, NoReturn

from .program_names import program_names
from .wire import MAX_MESSAGE_BYTES, decode, encode, pack, receive_bytes

GONE, GARBAGE = "(gone)", "(garbage)"
"""Failures beside exceptions' names: the candidate's end is closed; it sent what is no message."""
SMALL_BYTES = MAX_MESSAGE_BYTES // 16
"""What a candidate sent is at most a few times longer when it is sent back: smaller answers make no argument too large."""
SHALLOW_BYTES = 500
"""Nor do answers as short as this make one nested too deeply."""


class Gone(BaseException):
    """The candidate is dead, or sends what is no message; no test's `except Exception` swallows it."""


class TestsError(BaseException):
    """No program could pass: `Candidate.broken` says why."""


class Candidate:
    """The channel, as seen by the tests."""

    def __init__(self, channel: socket.socket) -> None:
        self.channel = channel
        self.failure = ""
        """What the candidate last raised, or `GONE` or `GARBAGE`."""
        self.broken = ""
        """Why the tests, and not the candidate, are to blame."""
        self.is_used = False
        """Has anything been done with what is the candidate's?"""
        self.largest_answer = 0
        """In bytes, or a number that tests may have made as many items of."""

    def ask(self, operation: str, *arguments: Any) -> Any:
        try:
            data = pack([operation, *(encode(argument, _number) for argument in arguments)])
        except Exception as error:
            harmless = SHALLOW_BYTES if isinstance(error, RecursionError) else SMALL_BYTES
            if isinstance(error, TypeError) or self.largest_answer <= harmless:
                self.broken = f"{type(error).__name__}: {error}"
                raise TestsError(self.broken) from error
            raise
        value = self.answer(data)
        self.is_used = self.is_used or operation != "global" or not isinstance(value, Remote)
        return value

    def answer(self, question: bytes = b"") -> Any:
        """To one message, or (none) to its own source, which it has run at the start."""
        try:
            if question:
                self.channel.sendall(question)
            data = receive_bytes(self.channel)
            kind, content = json.loads(data)
            self.largest_answer = max(self.largest_answer, len(data), abs(content) if type(content) is int else 0)
            if kind == "value":
                return decode(content, lambda number: Remote(self, number))
            if kind != "error" or not isinstance(content, str) or not content.isidentifier():
                raise ValueError("an answer is a value or an error's name")
        except Exception as error:  # whatever a hostile message brings about
            self.failure = GONE if isinstance(error, EOFError | OSError) else GARBAGE
            raise Gone(f"{type(error).__name__}: {error}") from error
        self.failure = content
        return _raise(content)


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
        object.__getattribute__(self, "_candidate").is_used = True
        raise TypeError("an object of the candidate's is no plain value: it cannot be compared")

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __bool__ = _refuse
    __hash__ = _refuse


def examine(channel: socket.socket, exam: Mapping[str, Any]) -> dict[str, Any]:
    """{"passed": tests passed, "failure": of the first that did not} or {"broken": why no candidate could pass}.

    exam: "setup", "tests", "entry_points" and "partial".
    """
    candidate = Candidate(channel)
    setup, tests = exam["setup"], exam["tests"]
    try:
        codes = [compile(source, f"test {i}", "exec", dont_inherit=True) for i, source in enumerate(tests)]
        names, modules = program_names("\n".join([setup, *tests]), exam["entry_points"])
        prologue = compile(setup, "setup", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return {"broken": f"{type(error).__name__}: {error}"}
    namespace: dict[str, Any] = {"__name__": "tests"}
    passed, failure = 0, ""
    try:
        candidate.answer()
        namespace |= {name: importlib.import_module(name) for name in modules}
        namespace |= {name: candidate.ask("global", name) for name in names}
    except (Exception, Gone) as error:
        return {"passed": 0, "failure": candidate.failure} if candidate.failure else {"broken": f"{type(error).__name__}: {error}"}
    failure = _run(prologue, namespace, candidate)
    if failure and not candidate.is_used and not candidate.failure:
        return {"broken": candidate.broken or f"setup: {failure}"}
    for code in codes if not failure else ():
        error_name = _run(code, namespace, candidate)
        passed += not error_name
        failure = failure or error_name
        if (failure and not exam["partial"]) or candidate.failure in (GONE, GARBAGE):
            break
    return {"broken": candidate.broken} if candidate.broken else {"passed": passed, "failure": failure}


def _run(code: Any, namespace: dict[str, Any], candidate: Candidate) -> str:
    """The name of what failed; empty when the test passed."""
    candidate.failure = name = ""
    try:
        exec(code, namespace)
    except Gone:
        return candidate.failure
    except BaseException as error:
        name = type(error).__name__
        if isinstance(error, ImportError) and candidate.failure != name:  # of the tests' own imports: no package is in here
            candidate.broken = candidate.broken or f"{name}: {error}"
    if candidate.failure in (GONE, GARBAGE):
        return candidate.failure
    if candidate.broken:
        return "TestsError"
    return (candidate.failure or name) if name else ""


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
