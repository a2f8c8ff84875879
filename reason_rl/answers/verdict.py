"""What a verifier says of one completion: right, wrong, or that it could not be graded.

"wrong" is a statement about the completion: it holds no answer, or not this one. "ungradable" is a statement about the
verifier: the right answer cannot be read, a deadline passed, a worker died, a sandbox is missing. It is counted and
logged, and its completion takes no part in the update; it is never a 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Status = Literal["right", "wrong", "ungradable"]


@dataclass(frozen=True)
class Verdict:
    status: Status
    cause: str = ""
    """One word for the metrics: why it is ungradable (deadline, crash, memory, start, stalled, raised, not_finite, gold,
    unreadable, sandbox, tests, closed), or why it is wrong where that is worth counting (no_answer, parse)."""
    value: float = 0.0
    """1.0 for right, 0.0 for wrong and ungradable; a share in between, or any finite number, for graded rewards."""
    detail: str = ""
    """For people: the error's own words."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """Further named numbers, where one request asks for several."""

    @property
    def is_graded(self) -> bool:
        return self.status != "ungradable"

    def to_wire(self) -> list[Any]:
        """As plain JSON, in the fields' order: what a worker sends back."""
        return [self.status, self.cause, self.value, self.detail[:400], dict(self.parts)]

    @classmethod
    def from_wire(cls, fields: Any) -> Verdict:
        """The inverse; raises ValueError for what is none."""
        kinds: list[Any] = [str, str, int | float, str, dict]
        if not (isinstance(fields, list) and len(fields) == len(kinds) and all(map(isinstance, fields, kinds))
                and fields[0] in get_args(Status) and all(isinstance(value, int | float) for value in fields[4].values())):
            raise ValueError(f"no verdict: {str(fields)[:80]}")
        return cls(*fields)


RIGHT = Verdict("right", value=1.0)
WRONG = Verdict("wrong")


def wrong(cause: str, detail: str = "") -> Verdict:
    return Verdict("wrong", cause, 0.0, detail)


def ungradable(cause: str, detail: str = "") -> Verdict:
    return Verdict("ungradable", cause, 0.0, detail)


def graded(value: float) -> Verdict:
    """A reward's number: right above 0, wrong otherwise; not finite is ungradable."""
    number = float(value)
    if not math.isfinite(number):
        return ungradable("not_finite", f"returned {number}")
    return Verdict("right" if number > 0 else "wrong", value=number)
