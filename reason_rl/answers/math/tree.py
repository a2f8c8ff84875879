"""`Node`: an answer as a tree. parse.py builds it, compare.py and evaluate.py read it."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from reason_rl.answers.math.tokens import Unreadable


@dataclass(frozen=True)
class Node:
    """One operation. `x > \\frac{1}{2}` is relation(name, div(number, number)) with the value ">"."""

    op: str
    """number name const neg add mul div pow pm call factorial percent degree mixed abs root based binom ·
    word quantity · list set bracket union matrix row relation"""
    args: tuple[Node, ...] = ()
    value: Fraction | str | None = None
    """number: its value; name, const, call, word: its text; quantity: its unit; bracket: its pair, such as
    "(]" or ":"; relation: its signs, such as "= <"; based: its digits."""


def number(text: str) -> Fraction:
    """The exact value of digits with a decimal point, an exponent, or a repeating part."""
    head, bar, repeating = text.partition(r"\overline{")
    if bar:
        digits, places = repeating.rstrip("}"), len(head.partition(".")[2])
        tail = Fraction(int(digits), (10 ** len(digits) - 1) * 10**places)
        return Fraction(head.rstrip(".") or 0) + tail
    mantissa, _, exponent = text.lower().partition("e")
    if len(exponent) > 4:
        raise Unreadable(f"an exponent has at most 4 characters, got {exponent[:20]}")
    return Fraction(mantissa) * Fraction(10) ** int(exponent or 0)


def negative(node: Node) -> Node:
    """The negated node. The percent sign, degree or base stays outermost: -5% is the percentage of -5."""
    if node.op in ("percent", "degree"):
        return Node(node.op, (negative(node.args[0]),))
    return Node("based", node.args, f"-{node.value}") if node.op == "based" else Node("neg", (node,))


def spelled(node: Node) -> str:
    """A tree as text, injective: used for subscripts, which are part of a name."""
    inside = f"({','.join(map(spelled, node.args))})" if node.args else ""
    return f"{'' if node.op in ('number', 'name') else node.op}{'' if node.value is None else node.value}{inside}"
