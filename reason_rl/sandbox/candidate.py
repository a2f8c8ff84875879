"""The candidate's side of the channel, inside its jail: run its source once, then do what the examiner asks, in plain values.

Nothing here is trusted: the candidate shares this process and may rewrite any of it. All it can gain is to send other values; what
they are compared with is in another process, which it cannot see.
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


def serve(channel: socket.socket, source: str) -> None:
    """Never returns: ends the process when the examiner closes the channel."""
    kept: list[Any] = []

    def keep(value: Any) -> int:
        kept.append(value)
        return len(kept) - 1

    def find(number: int | str) -> Any:
        return kept[number] if isinstance(number, int) else getattr(builtins, number)

    module = types.ModuleType("candidate")
    sys.modules["candidate"] = module
    operations: dict[str, Callable[..., Any]] = {
        "global": lambda name: _global(module, name), "call": lambda function, arguments, named: function(*arguments, **named),
        "getattr": getattr, "setattr": setattr, "getitem": operator.getitem, "setitem": operator.setitem, "len": len,
        "list": lambda values: list(itertools.islice(values, MAX_ITEMS)), "next": next, "str": str,
    }

    def reply(work: Callable[[], Any]) -> None:
        try:
            answer = ["value", encode(work(), keep)]
        except BaseException as error:  # SystemExit and KeyboardInterrupt end no examination
            answer = ["error", type(error).__name__]
        try:
            send(channel, answer)
        except ValueError:
            send(channel, ["error", "ValueError"])

    reply(lambda: exec(compile(source, "candidate.py", "exec", dont_inherit=True), module.__dict__))
    def perform(name: str, arguments: list[Any]) -> Any:
        return operations[name](*(decode(argument, find) for argument in arguments))

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
