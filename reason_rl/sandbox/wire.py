"""The channel's format: plain values as JSON messages with a length prefix.

Hostile code writes the messages that leave a jail, so they are never unpickled. They build values of exactly
the types below and no subclass, so that no `__eq__` of the candidate's reaches a comparison. An object of any
other type stays in its process, and the other side gets a `Remote`. Imported inside the jail: standard
library only.
"""

from __future__ import annotations

import importlib
import json
import socket
import struct
from collections.abc import Callable
from typing import Any

MAX_MESSAGE_BYTES = 8 << 20
LENGTH = struct.Struct("!I")
# Other types, as the arguments of their constructors.
PARTS: dict[str, Callable[[Any], list[Any]]] = {
    "builtins.complex": lambda v: [v.real, v.imag],
    "builtins.range": lambda v: [v.start, v.stop, v.step],
    "builtins.bytes": lambda v: [list(v)],
    "builtins.bytearray": lambda v: [list(v)],
    "array.array": lambda v: [v.typecode, v.tolist()],
    "collections.deque": lambda v: [list(v)],
    "fractions.Fraction": lambda v: [v.numerator, v.denominator],
    "decimal.Decimal": lambda v: [str(v)],
    "datetime.date": lambda v: [v.year, v.month, v.day],
    "datetime.timedelta": lambda v: [v.days, v.seconds, v.microseconds],
    "datetime.datetime": lambda v: [v.year, v.month, v.day, v.hour, v.minute, v.second, v.microsecond],
}
CONTAINERS: dict[str, type] = {"tuple": tuple, "set": set, "frozenset": frozenset}
SUBCLASSED: tuple[Callable[[Any], Any], ...] = (int, float, str, tuple, list, dict, set, frozenset)

Keep = Callable[[Any], int | str]
Find = Callable[[Any], Any]


def encode(value: Any, keep: Keep) -> Any:
    """The value as JSON. keep: stores an object that does not travel and returns its index or name."""
    # JSON's types and containers of them.
    kind = type(value)
    if value is None or kind in (bool, float, str):
        return value
    if kind is int:
        return value if abs(value) < 1 << 63 else {"int": hex(value)}
    if kind is list:
        return [encode(item, keep) for item in value]
    if kind is dict:
        return {"dict": [[encode(k, keep), encode(v, keep)] for k, v in value.items()]}
    if kind.__name__ in CONTAINERS and kind is CONTAINERS[kind.__name__]:
        return {kind.__name__: [encode(item, keep) for item in value]}

    # Other plain types, subclasses of plain types, and objects that do not travel.
    name = f"{kind.__module__}.{kind.__qualname__}"
    if name in PARTS:
        return {name: [encode(part, keep) for part in PARTS[name](value)]}
    for base in SUBCLASSED:  # a Counter travels as a dict, an IntEnum as an int, a namedtuple as a tuple
        if isinstance(value, base):  # type: ignore[arg-type]
            return encode(base(value), keep)
    return {"remote": keep(value)}


def decode(data: Any, find: Find) -> Any:
    """The inverse of `encode`. Raises ValueError, TypeError or others for JSON that `encode` never writes."""
    if isinstance(data, list):
        return [decode(item, find) for item in data]
    if not isinstance(data, dict):
        return data

    # Any object is one pair: its type's name, and its content.
    ((name, content),) = data.items()
    if name == "int":
        return int(content, 16)
    if name == "remote":
        return find(content)
    items = decode(content, find)
    if name == "dict":
        return dict(items)
    if name in CONTAINERS:
        return CONTAINERS[name](items)
    if name not in PARTS:
        raise ValueError(f"expected a value of type {', '.join(PARTS)}, got {name!r}")
    module, _, kind = name.rpartition(".")
    return getattr(importlib.import_module(module), kind)(*items)


def pack(message: Any) -> bytes:
    data = json.dumps(message).encode()
    if len(data) > MAX_MESSAGE_BYTES:
        raise ValueError(f"a message is at most {MAX_MESSAGE_BYTES} bytes, got {len(data)}")
    return LENGTH.pack(len(data)) + data


def send(channel: socket.socket, message: Any) -> None:
    channel.sendall(pack(message))


def receive(channel: socket.socket) -> Any:
    """Raises EOFError if the other end is closed, ValueError for a malformed message."""
    return json.loads(receive_bytes(channel))


def receive_bytes(channel: socket.socket) -> bytes:
    """One message, as its JSON text."""
    (length,) = LENGTH.unpack(_receive_exactly(channel, LENGTH.size))
    if length > MAX_MESSAGE_BYTES:
        raise ValueError(f"a message is at most {MAX_MESSAGE_BYTES} bytes, got {length}")
    return _receive_exactly(channel, length)


def _receive_exactly(channel: socket.socket, count: int) -> bytes:
    parts: list[bytes] = []
    while count:
        part = channel.recv(min(count, 1 << 20))
        if not part:
            raise EOFError("the other end of the channel is closed")
        parts.append(part)
        count -= len(part)
    return b"".join(parts)
