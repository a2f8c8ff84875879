"""`Verdict`: a verifier's judgement of one completion.

"wrong" is about the completion: it has no answer, or another one. "ungradable" is about the verifier: it
cannot read the right answer, a deadline passed, a worker died, no sandbox holds. An ungradable completion is
counted, logged and left out of the update; it never becomes a 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Status = Literal["right", "wrong", "ungradable"]


@dataclass(frozen=True)
class Verdict:
    """`Verdict("right", value=1.0)`, `Verdict("wrong", "no_answer")`, `Verdict("ungradable", "deadline")`"""

    status: Status
    cause: str = ""
    """One word for the metrics. Of ungradable: deadline, crash, memory, start, stalled, raised, not_finite,
    gold, unreadable, sandbox, tests, closed. Of wrong, where it is counted: no_answer, parse, and how a
    program failed."""
    value: float = 0.0
    """1.0 if right, 0.0 if wrong or ungradable; any finite number for partial credit and custom rewards."""
    detail: str = ""
    """The error's message, for people."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """Further numbers by name, for a request that asks for several."""

    @property
    def is_graded(self) -> bool:
        return self.status != "ungradable"

    def to_wire(self) -> list[Any]:
        """The fields in order, as plain JSON: the reply of a worker."""
        return [self.status, self.cause, self.value, self.detail[:400], dict(self.parts)]

    @classmethod
    def from_wire(cls, fields: Any) -> Verdict:
        """The inverse; raises ValueError for any other value."""
        kinds: list[Any] = [str, str, int | float, str, dict]
        if not (isinstance(fields, list) and len(fields) == len(kinds) and all(map(isinstance, fields, kinds))
                and fields[0] in get_args(Status) and all(isinstance(value, int | float) for value in fields[4].values())):
            raise ValueError(f"expected a verdict as [status, cause, value, detail, parts], got {str(fields)[:80]}")
        return cls(*fields)


RIGHT = Verdict("right", value=1.0)
WRONG = Verdict("wrong")


def wrong(cause: str, detail: str = "") -> Verdict:
    return Verdict("wrong", cause, 0.0, detail)


def ungradable(cause: str, detail: str = "") -> Verdict:
    return Verdict("ungradable", cause, 0.0, detail)


def graded(value: float) -> Verdict:
    """A reward's number as a verdict: right above 0, wrong otherwise, ungradable if not finite."""
    number = float(value)
    if not math.isfinite(number):
        return ungradable("not_finite", f"returned {number}")
    return Verdict("right" if number > 0 else "wrong", value=number)
