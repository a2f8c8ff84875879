"""The examiner: executes a problem's tests in its own jail, against a candidate in another process.

The tests are ordinary Python (`assert f(2) == 4`). The names that the program must define are proxies: a call
travels to the candidate's process as plain values, and a plain value returns (wire.py). So the candidate
never sees the tests, cannot change `assert` or `==`, and cannot claim to have passed. A result that is not a
plain value equals nothing: `Remote` refuses `==`, `!=`, order, truth and hashing.

Changes that a candidate makes to its arguments do not come back: a function is judged by its return value. If
no program can pass (the tests pass a function as an argument, arguments larger than a message, or import a
missing module), the result is "broken".
"""

from __future__ import annotations

import builtins
import importlib
import json
import socket
import types
from collections.abc import Mapping
from typing import Any, NoReturn

from .wire import MAX_MESSAGE_BYTES, decode, encode, pack, receive_bytes

GONE, GARBAGE = "(gone)", "(garbage)"
"""Failures besides exceptions' names: the candidate closed its end; it sent a malformed message."""
SMALL_BYTES = MAX_MESSAGE_BYTES // 16
"""If every answer of the candidate was at most this long, it did not cause an argument that is too large."""
SHALLOW_BYTES = 500
"""The same for an argument that is nested too deeply."""


class Gone(BaseException):
    """The candidate is dead or sends malformed messages. No `except Exception` hides a BaseException."""


class TestsError(BaseException):
    """No program can pass; `Candidate.broken` has the reason."""


class Candidate:
    """The examiner's end of the channel."""

    def __init__(self, channel: socket.socket) -> None:
        self.channel = channel
        self.failure = ""
        """The name of the candidate's last exception, or `GONE` or `GARBAGE`."""
        self.broken = ""
        """Why no program can pass these tests."""
        self.is_used = False
        """Have the tests used anything of the candidate's?"""
        self.largest_answer = 0
        """The longest answer in bytes, or a larger integer among the answers (the tests may have repeated
        something as often)."""

    def ask(self, operation: str, *arguments: Any) -> Any:
        """Performs an operation in the candidate's process; raises what it raises."""
        try:
            data = pack([operation, *(encode(argument, _reference) for argument in arguments)])
        except Exception as error:
            harmless = SHALLOW_BYTES if isinstance(error, RecursionError) else SMALL_BYTES
            if isinstance(error, TypeError) or self.largest_answer <= harmless:
                self.broken = f"{type(error).__name__}: {error}"
                raise TestsError(self.broken) from error
            raise
        value = self.answer(data)
        self.is_used = self.is_used or operation != "global" or not isinstance(value, Remote)
        return value

    def answer(self, request: bytes = b"") -> Any:
        """The answer to a request; without one, the outcome of executing the program."""
        try:
            if request:
                self.channel.sendall(request)
            data = receive_bytes(self.channel)
            kind, content = json.loads(data)

            # A value, or the name of an exception; anything else is garbage.
            self.largest_answer = max(self.largest_answer, len(data), abs(content) if type(content) is int else 0)
            if kind == "value":
                return decode(content, lambda number: Remote(self, number))
            if kind != "error" or not isinstance(content, str) or not content.isidentifier():
                raise ValueError("expected a value or an error's name")
        except Exception as error:  # a hostile message may raise anything
            self.failure = GONE if isinstance(error, EOFError | OSError) else GARBAGE
            raise Gone(f"{type(error).__name__}: {error}") from error
        self.failure = content
        return _raise(content)


class Remote:
    """A proxy of an object of the candidate's that does not travel."""

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
        raise TypeError("an object of the candidate's cannot be compared: it is not a plain value")

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __bool__ = _refuse
    __hash__ = _refuse


def examine(channel: socket.socket, exam: Mapping[str, Any]) -> dict[str, Any]:
    """{"passed": number of tests passed, "failure": of the first other test} or {"broken": why no program can
    pass}.

    exam: the fields of run.py's `Exam`.
    """
    # Compile everything first: tests that do not compile are broken.
    candidate = Candidate(channel)
    setup, tests = exam["setup"], exam["tests"]
    try:
        codes = [compile(source, f"test {i}", "exec", dont_inherit=True) for i, source in enumerate(tests)]
        prologue = compile(setup, "setup", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return {"broken": f"{type(error).__name__}: {error}"}

    # The names that the tests need: the program's, once its source has run, and modules.
    namespace: dict[str, Any] = {"__name__": "tests"}
    try:
        candidate.answer()
        namespace |= {name: importlib.import_module(name) for name in exam["modules"]}
        namespace |= {name: candidate.ask("global", name) for name in exam["names"]}
    except (Exception, Gone) as error:
        return {"passed": 0, "failure": candidate.failure} if candidate.failure else {"broken": f"{type(error).__name__}: {error}"}

    # A setup that fails before it used the program fails for every program.
    failure = _run(prologue, namespace, candidate)
    if failure and not candidate.is_used and not candidate.failure:
        return {"broken": candidate.broken or f"setup: {failure}"}

    # The tests, up to the first failure unless all are counted.
    num_passed = 0
    for code in codes if not failure else ():
        error_name = _run(code, namespace, candidate)
        num_passed += not error_name
        failure = failure or error_name
        if (failure and not exam["is_partial"]) or candidate.failure in (GONE, GARBAGE):
            break
    return {"broken": candidate.broken} if candidate.broken else {"passed": num_passed, "failure": failure}


def _run(code: Any, namespace: dict[str, Any], candidate: Candidate) -> str:
    """The name of the failure; "" if the test passed."""
    candidate.failure = name = ""
    try:
        exec(code, namespace)
    except Gone:
        return candidate.failure
    except BaseException as error:
        name = type(error).__name__
        if isinstance(error, ImportError) and candidate.failure != name:  # the tests' own import: the jail has no packages
            candidate.broken = candidate.broken or f"{name}: {error}"
    if candidate.failure in (GONE, GARBAGE):
        return candidate.failure
    if candidate.broken:
        return "TestsError"
    return (candidate.failure or name) if name else ""


def _reference(value: Any) -> int | str:
    """A message's reference to an object that does not travel: the candidate's index, or a builtin's name."""
    if isinstance(value, Remote):
        number: int = object.__getattribute__(value, "_number")
        return number
    if isinstance(value, type | types.BuiltinFunctionType):
        name = value.__name__
        if getattr(builtins, name, None) is value:
            return name
    raise TypeError(f"a test passes plain values, builtins and the candidate's own objects, got {type(value).__name__}")


def _raise(name: str) -> NoReturn:
    """Raises the builtin exception of that name, which a test may expect; RuntimeError for other names."""
    kind = getattr(builtins, name, RuntimeError)
    if not (isinstance(kind, type) and issubclass(kind, Exception)):
        kind = RuntimeError
    try:
        error = kind("raised by the candidate")
    except TypeError:
        error = RuntimeError(name)
    raise error
