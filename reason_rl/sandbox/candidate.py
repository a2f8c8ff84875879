"""The candidate's end of the channel, inside its jail: executes the program once, then serves the examiner's
requests.

Nothing here is trusted: the program shares this process and may rewrite all of it. It gains nothing but to
send other values; the comparison happens in another process, which it cannot reach.
"""

from __future__ import annotations

import builtins
import functools
import itertools
import operator
import os
import socket
import sys
import types
from collections.abc import Callable
from typing import Any

from .wire import decode, encode, receive, send

MAX_ITEMS = 1_000_000
OPERATIONS: dict[str, Callable[..., Any]] = {
    "call": lambda function, arguments, named: function(*arguments, **named),
    "getattr": getattr, "setattr": setattr, "getitem": operator.getitem, "setitem": operator.setitem, "len": len,
    "list": lambda values: list(itertools.islice(values, MAX_ITEMS)), "next": next, "str": str,
}
"""What the examiner may ask for, besides "global": one of the program's names."""


def serve(channel: socket.socket, source: str) -> None:
    """Never returns: ends the process when the examiner closes the channel."""
    # Objects that do not travel are kept here, and the examiner refers to them by index.
    kept: list[Any] = []

    def keep(value: Any) -> int:
        kept.append(value)
        return len(kept) - 1

    def find(reference: int | str) -> Any:
        return kept[reference] if isinstance(reference, int) else getattr(builtins, reference)

    module = types.ModuleType("candidate")
    sys.modules["candidate"] = module
    operations = OPERATIONS | {"global": functools.partial(_global, module)}

    def reply(work: Callable[[], Any]) -> None:
        try:
            answer = ["value", encode(work(), keep)]
        except BaseException as error:  # SystemExit and KeyboardInterrupt are errors like any other
            answer = ["error", type(error).__name__]
        try:
            send(channel, answer)
        except ValueError:  # too large for a message
            send(channel, ["error", "ValueError"])

    def perform(name: str, arguments: list[Any]) -> Any:
        return operations[name](*(decode(argument, find) for argument in arguments))

    # The program first, then one request at a time until the channel closes.
    reply(lambda: exec(compile(source, "candidate.py", "exec", dont_inherit=True), module.__dict__))
    try:
        while True:
            name, *arguments = receive(channel)
            reply(functools.partial(perform, name, arguments))
    except BaseException:
        os._exit(0)


def _global(module: types.ModuleType, name: str) -> Any:
    if name not in module.__dict__:
        raise NameError(name)
    return module.__dict__[name]
