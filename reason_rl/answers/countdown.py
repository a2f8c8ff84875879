"""The countdown verifier: does this expression use each number exactly once and equal the target?

TinyZero's rules: + - * / and parentheses, each given number once, no unary minus. A walk over the syntax tree
computes the value in exact fractions. It accepts integers and those four operators only: no `**`, `//`,
names, calls or floats. Length, digits and nesting are bounded before parsing. Python never evaluates the
text.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from fractions import Fraction

MAX_CHARACTERS = 128
MAX_DIGITS = 4
MAX_DEPTH = 16
CHARACTERS = re.compile(r"[0-9+\-*/() ]+")


def is_countdown_solution(text: str, numbers: Sequence[int], target: int) -> bool:
    """Never raises, whatever the text."""
    # Bounds first: ast.parse would take long on a huge text, and recurse on a deep one.
    if len(text) > MAX_CHARACTERS or not CHARACTERS.fullmatch(text) or _depth(text) > MAX_DEPTH:
        return False
    if any(len(digits) > MAX_DIGITS for digits in re.findall(r"[0-9]+", text)):
        return False

    try:
        tree = ast.parse(text.strip(), mode="eval")
        used: list[int] = []
        value = _value(tree.body, used)
    except (SyntaxError, ValueError, ZeroDivisionError):
        return False
    return sorted(used) == sorted(numbers) and value == target


def _value(node: ast.expr, used: list[int]) -> Fraction:
    """The node's value. Appends each integer it reads to `used`."""
    match node:
        case ast.Constant(value=number) if type(number) is int:
            used.append(number)
            return Fraction(number)
        case ast.BinOp(left=left, op=operator, right=right):
            a, b = _value(left, used), _value(right, used)
            match operator:
                case ast.Add():
                    return a + b
                case ast.Sub():
                    return a - b
                case ast.Mult():
                    return a * b
                case ast.Div():
                    return a / b
    raise ValueError(f"a countdown answer consists of integers and + - * /, got {type(node).__name__}")


def _depth(text: str) -> int:
    """The deepest nesting of parentheses."""
    depth = deepest = 0
    for character in text:
        depth += (character == "(") - (character == ")")
        deepest = max(deepest, depth)
    return deepest
