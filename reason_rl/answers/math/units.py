"""Units after a value: compares two units, and refuses words that are not units.

A unit has a name, a power and a "per": cm^2, km/h, square units. Two names are compared if both are known: 5
apples may be 5 fruits, but 5 cm differ from 5 m. Powers and "per" are always compared, since they make
another quantity. Nothing is converted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

UNITS = {name: unit for unit, names in {
    "dollar": "$ dollar dollars usd buck bucks", "euro": "€ euro euros eur", "sterling": "£ gbp", "yen": "yen jpy",
    "rupee": "rupee rupees", "peso": "peso pesos", "cent": "cent cents penny pennies",
    "second": "second seconds sec s", "minute": "minute minutes min mins", "hour": "hour hours hr hrs h", "day": "day days",
    "week": "week weeks", "month": "month months", "year": "year years",
    "meter": "meter meters metre metres m", "centimeter": "centimeter centimeters cm", "kilometer": "kilometer kilometers km",
    "millimeter": "millimeter millimeters mm", "inch": "inch inches in", "foot": "foot feet ft", "mile": "mile miles mi",
    "yard": "yard yards yd", "gram": "gram grams g", "kilogram": "kilogram kilograms kg", "pound": "pound pounds lb lbs",
    "ounce": "ounce ounces oz", "degree": "degree degrees", "radian": "radian radians",
}.items() for name in names.split()}
"""Known units: two of different canonical names differ."""
ONE_WORD = {"pound", "sterling"}
"""The exception: a pound may be a mass or money, so 5 pounds may be £5."""
SHORT = {"mph": "mile per hour", "kph": "km per hour", "kmh": "km per hour"}
POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
PART = re.compile(r"\^\s*\{?\s*(-?\d{1,2})\s*\}?|/|[^\s/^]+")

CHANGES = frozenset((
    "or", "and", "not", "no", "minus", "plus", "times", "over", "point", "if", "then", "but", "than", "either", "maybe", "except",
    "without", "negative", "divided", "between", "to", "versus", "squared", "cubed", "root", "power", "factorial", "reciprocal",
    "inverse", "opposite", "half", "halves", "halved", "third", "thirds", "quarter", "quarters", "fifth", "fifths", "eighth",
    "eighths", "ninth", "ninths", "twelfth", "twelfths", "double", "doubles", "doubled", "twice", "triple", "triples", "tripled",
    "thrice", "quadruple", "quadruples", "quadrupled", "score", "scores", "gross"))
"""Words that change the number before them, or add another: an answer with one of them has no unit."""
NUMERAL = re.compile(
    r"(?:zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|(?:thir|four|fif|six|seven|eigh|nine)teen|"
    r"(?:twen|thir|for|four|fif|six|seven|eigh|nine)t(?:y|ie)|hundred|thousand|[mbtr]+illion|dozen)(?:s|ths?|fold)?")
"""Number words, and fractions and multiples of them: fifty, tenths, hundredths, threefold."""


@dataclass(frozen=True)
class Unit:
    name: str
    power: int
    per: str


def unit_words(text: str) -> list[str]:
    """Splits "km/h" into [km, per, h], "cm^2" into [cm, ^2], "square cm" into [square, cm]."""
    words = [f"^{found[1]}" if found[1] else {"/": "per"}.get(found[0], found[0]) for found in PART.finditer(text.lower())]
    return [word for word in (word.replace(".", "") for word in words) if word]


def changes_the_value(words: list[str]) -> bool:
    """Is one of the words a number, a fraction word, or in CHANGES?"""
    parts = [part for word in words if word[0] != "^" for part in word.split("-")]
    return any(part in CHANGES or NUMERAL.fullmatch(part) or any(c.isdigit() for c in part) for part in parts)


def may_be_same(gold: str, given: str) -> bool:
    """Compares two units as words; an empty one matches any."""
    if not gold or not given:
        return True
    a, b = read_unit(gold), read_unit(given)
    return a.power == b.power and bool(a.per) == bool(b.per) and not (differ(a.name, b.name) or differ(a.per, b.per))


def read_unit(text: str) -> Unit:
    words = list(_expanded(text.split()))
    head, tail = (words[: words.index("per")], words[words.index("per") + 1 :]) if "per" in words else (words, [])
    name, power = _read(head)
    per, per_power = _read([word for word in tail if word != "per"])
    return Unit(name, power, per if per_power == 1 else f"{per}^{per_power}")


def differ(a: str, b: str) -> bool:
    """Are the powers different, or the names both known and different?"""
    (a_name, *a_power), (b_name, *b_power) = a.split("^"), b.split("^")
    is_known = a_name in UNITS.values() and b_name in UNITS.values()
    return a_power != b_power or (is_known and a_name != b_name and {a_name, b_name} != ONE_WORD)


def _expanded(words: list[str]) -> Iterator[str]:
    for word in words:
        yield from SHORT.get(word, word).split()


def _read(words: list[str]) -> tuple[str, int]:
    """(name, power): of several names, the first known one."""
    power = 1
    names: list[str] = []
    for word in words:
        if word[0] == "^":
            power *= int(word[1:])
        elif word in POWERS:
            power *= POWERS[word]
        else:
            names.append(word)
    return next((UNITS[name] for name in names if name in UNITS), " ".join(names)), power
