"""`grade_math`: does a completion's answer equal the right answer by value?

A kind of the verifier service. extract.py finds the answer; tokens.py, parse.py and units.py turn it into a
tree (tree.py); compare.py and evaluate.py decide. Two plain numbers, the common case, are compared here by
one pattern. Answers that are words are compared as text. Every bound (characters, digits, tokens, nesting,
bits, exponents) is checked before the work it bounds, so that no text takes long; the service's deadline is
the second line of defence. A right answer that cannot be read is an error in the data: ungradable, unless the
completion has the same text.

Left out: sympy and math-verify. Answers need a small grammar and their values, and code that reads hostile
texts should be small enough to review.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from functools import lru_cache
from typing import Any

from reason_rl.answers.extract import find_answer
from reason_rl.answers.math.compare import Comparison
from reason_rl.answers.math.parse import parse
from reason_rl.answers.math.tokens import MAX_CHARACTERS, Unreadable
from reason_rl.answers.math.tree import Node
from reason_rl.answers.verdict import RIGHT, WRONG, Verdict, ungradable, wrong

NUMBER = re.compile(r"([-+]?)(?:\\?\$)?(\d{1,100}|[1-9]\d{0,2}(?:,\d{3}){1,30})(\.\d{1,100})?", re.ASCII)
FRACTION = re.compile(r"([-+]?)(?:(\d{1,100})/(\d{1,100})|\\[dt]?frac\{(\d{1,100})\}\{(\d{1,100})\})", re.ASCII)
WRAPPED = re.compile(r"\\(?:text|textbf|textit|mbox|mathrm)\s*\{([^{}]*)\}")
WORDS = re.compile(r"[A-Za-z][A-Za-z ]{2,}")
SPACE = re.compile(r"(?:\\[ ,;]|\s)+")
LOOSE_SPACE = re.compile(r"(?<!\w) | (?!\w)")


def grade_math(request: Mapping[str, Any]) -> Verdict:
    """request: "text", the completion; "answer", the right answer."""
    given = find_answer(request["text"])
    if given is None:
        return wrong("no_answer")
    return grade_answer(str(request["answer"]).strip(), given)


def grade_answer(gold: str, given: str) -> Verdict:
    """gold, given: the texts of two answers, the right one first."""
    if len(given) > MAX_CHARACTERS:
        return wrong("parse", f"an answer has at most {MAX_CHARACTERS} characters, got {len(given)}")

    # The quick ways: two plain numbers, equal texts, words.
    quick_gold, quick = quick_value(gold), quick_value(given)
    if quick_gold is not None and quick is not None:
        is_undone = "/" in given or "frac" in given
        return RIGHT if quick == quick_gold and not (is_undone and quick_gold.denominator == 1) else WRONG
    if is_same_text(gold, given):
        return RIGHT
    if WORDS.fullmatch(gold):
        return WRONG

    # The long way: read both, compare the values. An answer to a list may use commas as separators or for
    # thousands.
    try:
        tree = read_gold(gold)
    except Unreadable as error:
        return ungradable("gold", f"{gold[:80]!r}: {error}")
    try:
        readings = [parse(given)]
        if tree.op in ("list", "set") and "," in given:
            readings.append(parse(given, with_thousands=False))
        comparison = Comparison(gold)
        return RIGHT if any(comparison.same(tree, reading) for reading in readings) else WRONG
    except (Unreadable, RecursionError) as error:
        return wrong("parse", f"{given[:80]!r}: {error}")


@lru_cache(maxsize=4096)
def read_gold(text: str) -> Node:
    """The right answer's tree; raises `Unreadable` if it cannot be read or has no value."""
    try:
        tree = parse(text)
        Comparison(text).check(tree)
        return tree
    except RecursionError as error:
        raise Unreadable(str(error)) from error


def quick_value(text: str) -> Fraction | None:
    """The value of a plain integer, decimal or fraction; None for any other text."""
    if found := NUMBER.fullmatch(text):
        sign, whole, decimals = found.groups()
        value = Fraction(whole.replace(",", "") + (decimals or ""))
    elif found := FRACTION.fullmatch(text):
        sign, *parts = found.groups()
        top, bottom = [int(part) for part in parts if part is not None]
        if bottom == 0:
            return None
        value = Fraction(top, bottom)
    else:
        return None
    return -value if sign == "-" else value


def is_same_text(gold: str, given: str) -> bool:
    a, b = spelled(gold), spelled(given)
    return a == b and a != ""


def spelled(text: str) -> str:
    """Drops wrappers, white space around signs and a choice's brackets; words become lower case."""
    text = LOOSE_SPACE.sub("", SPACE.sub(" ", WRAPPED.sub(r" \1 ", text).strip(" $"))).rstrip(".")
    if re.fullmatch(r"\([A-Za-z]\)", text):
        return text[1]
    return text.casefold() if re.search(r"[A-Za-z]{4}", text) else text
