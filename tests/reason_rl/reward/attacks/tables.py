"""Reads the attack tables: TOML files in this folder, each a list of cases; math.toml explains their format."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TABLES = sorted(path.stem for path in HERE.glob("*.toml"))
REPEATED = re.compile(r"<<(.+?)\*(\d+)>>", re.DOTALL)


@dataclass(frozen=True)
class Attack:
    name: str
    case: Mapping[str, Any]
    text: str
    verdict: str
    """right (an honest completion, there to show that the case can be solved), wrong or ungradable."""
    cause: str = ""
    """The verdict's, where the table names it."""


def load(table: str, **places: object) -> list[Attack]:
    """places: the values of @victim@, @parent@ and others in the texts."""
    def text_of(template: str) -> str:
        text = REPEATED.sub(lambda found: found[1] * int(found[2]), template)
        for name, value in places.items():
            text = text.replace(f"@{name}@", str(value))
        return text

    attacks = []
    for case in tomllib.loads((HERE / f"{table}.toml").read_text(encoding="utf-8"))["case"]:
        frame = case.get("frame", "@text@")
        rows = [("right", f"honest {i}", text, "") for i, text in enumerate(case["right"])]
        for verdict in ("wrong", "ungradable"):
            for row in case.get(verdict, []):
                rows.append((verdict, row[0], row[1], "") if isinstance(row, list)
                            else (verdict, row["name"], row["text"], row.get("cause", "")))
        attacks += [Attack(name, case, text_of(frame.replace("@text@", text)), verdict, cause)
                    for verdict, name, text, cause in rows]
    return attacks
