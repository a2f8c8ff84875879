"""Compares two answers' trees by value, with one rule for each kind of answer.

If the right answer is a plain number, the completion must give a number with no arithmetic left to do: 48+24,
2^3 and 48/2 are not 72, 8 and 24. Otherwise a policy could learn to repeat the question as its answer. All
other answers are compared by value: two fractions exactly, other numbers to 20 digits, expressions with names
at random points (seeded by the right answer's text).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

from reason_rl.answers.math.evaluate import Value, are_equal, evaluate, is_real
from reason_rl.answers.math.tokens import Unreadable
from reason_rl.answers.math.tree import Node, number
from reason_rl.answers.math.units import may_be_same

NUM_POINTS = 4
SIGNS = ((1, 1, 1), (1, -1, 1), (-1, 1, 1), (-1, -1, -1))
"""Signs of the first three names at each point. Each name and each product of them is positive at one point
and negative at another, so that the root of a square differs from its base."""
MIN_POINTS = 2
"""Fewest points at which both must have a value for a comparison to count."""
STRUCTURED = {"list", "set", "bracket", "union", "matrix", "row", "relation", "word"}
"""Nodes without a single value."""
REVERSED = {"=": "=", "!=": "!=", "<": ">", ">": "<", "<=": ">=", ">=": "<="}

At = Callable[[Node, Mapping[str, Fraction]], Value]


class Comparison:
    """Compares with one right answer; `seed`, its text, draws the points."""

    def __init__(self, seed: str) -> None:
        self.seed = seed

    def same(self, gold: Node, given: Node) -> bool:
        """May raise `Unreadable` if one of them has no value."""
        if gold == given:
            return True

        # Rewrite both: +- as two values, x = 5 as 5, x > 5 as an interval, each if the other allows it.
        gold, given = spread(gold), spread(given)
        gold, given = self.bare(gold, given), self.bare(given, gold)
        if gold.op == "relation" and given.op == "relation":
            return self.same_relation(gold, given)
        if given.op == "relation" and set(str(given.value).split()) == {"="}:
            return self.same_chain(gold, given)
        gold, given = as_region(gold, given.op), as_region(given, gold.op)

        # Compare by the kind of the right answer.
        if is_infinite(gold) or is_infinite(given):
            return gold == given
        if gold.op in ("list", "set") or given.op in ("list", "set"):
            return given.op in ("list", "set") and gold.op in ("list", "set") and self.same_in_any_order(gold.args, given.args)
        if gold.op != given.op and {gold.op, given.op} & STRUCTURED:
            return False
        match gold.op:
            case "bracket":
                return gold.value == given.value and self.same_in_order(gold.args, given.args)
            case "union":
                return self.same_in_any_order(gold.args, given.args)
            case "matrix" | "row":
                return self.same_in_order(gold.args, given.args)
            case "word":
                return str(gold.value).casefold() == str(given.value).casefold()
        return self.same_value(gold, given)

    def same_in_order(self, gold: Sequence[Node], given: Sequence[Node]) -> bool:
        return len(gold) == len(given) and all(self.same(a, b) for a, b in zip(gold, given))

    def same_in_any_order(self, gold: Sequence[Node], given: Sequence[Node]) -> bool:
        """Equal as multisets."""
        left = list(given)
        for a in gold:
            found = next((index for index, b in enumerate(left) if self.same(a, b)), None)
            if found is None:
                return False
            del left[found]
        return not left

    def bare(self, node: Node, other: Node) -> Node:
        """Turns x = 5 into 5 if the other answer is not an equation, or is one of the same name."""
        if node.op != "relation" or set(str(node.value).split()) != {"="}:
            return node
        for name, rest in ((node.args[0], node.args[1:]), (node.args[-1], node.args[:-1])):
            same_name = other.op == "relation" and name in (other.args[0], other.args[-1])
            if is_named(name, rest) and (other.op != "relation" or same_name):
                return rest[0] if len(rest) == 1 else Node("relation", rest, " ".join("=" for _ in rest[1:]))
        return node

    def same_chain(self, gold: Node, given: Node) -> bool:
        """48 + 24 = 72: every value equals the right one, and the first or the last alone is an answer."""
        ends, equal = (given.args[-1], given.args[0]), self.same if gold.op in STRUCTURED else self.equal_values
        return any(self.same(gold, end) for end in ends) and all(equal(gold, part) for part in given.args)

    def same_relation(self, gold: Node, given: Node) -> bool:
        # Inequalities of one name: as intervals.
        regions = as_region(gold, "bracket"), as_region(given, "bracket")
        if all(region.op == "bracket" for region in regions):
            named = [names_in(node) for node in (gold, given)]
            return named[0] == named[1] and self.same(*regions)

        # A solved equation must be answered by a solved one: 2x = 10 may be the question that x = 5 answers.
        if (gold_parts := solved(gold)) is not None:
            given_parts = solved(given)
            return given_parts is not None and gold_parts[:2] == given_parts[:2] and self.same(gold_parts[2], given_parts[2])

        # A chain is compared value by value.
        (gold, gold_signs), (given, given_signs) = turned(gold), turned(given)
        if gold_signs != given_signs:
            return False
        if len(gold_signs) != 1:
            return self.same_in_order(gold.args, given.args)

        # Else: is one a constant multiple of the other? An inequality allows positive factors only.
        ratios = self.at_points(gold, given, difference)
        quotients = [a / b for a, b in ratios if a != 0 and b != 0]
        wants_sign = gold_signs[0] in ("<", "<=")
        return (len(quotients) >= MIN_POINTS and len(quotients) == len(ratios)
                and all(are_equal(quotients[0], quotient) for quotient in quotients[1:])
                and (not wants_sign or (isinstance(quotients[0], Fraction) and quotients[0] > 0)))

    def same_value(self, gold: Node, given: Node) -> bool:
        """Compares numbers and expressions with their units and percent signs."""
        (gold, gold_unit), (given, given_unit) = unit_of(gold), unit_of(given)
        if not may_be_same(gold_unit, given_unit):
            return False
        if gold.op == "percent" or given.op == "percent":
            # 50% may be written as 50 or as 0.5. But 3/4% is not 3/4, and 50% is not $50.
            shown = [node.args[0] if node.op == "percent" else node for node in (gold, given)]
            may_be_bare = not gold_unit and (gold.op == "percent" or gold.op in ("number", "neg"))
            return (may_be_bare and self.same_value(*shown)) or (
                gold.op != given.op and is_plain(shown[1]) and not is_undone(shown[1]) and self.equal_values(gold, given))
        if gold.op == "based" and given.op != "based":  # 204_5 may be written as 204
            return is_plain(given) and self.equal_values(Node("number", (), number(str(gold.value))), given)
        if is_plain(gold) and not (is_plain(given) and not is_undone(given)):
            return False
        return self.equal_values(gold, given)

    def equal_values(self, gold: Node, given: Node) -> bool:
        pairs = self.at_points(gold, given, evaluate)
        return len(pairs) >= (MIN_POINTS if names_in(gold) | names_in(given) else 1) and all(are_equal(a, b) for a, b in pairs)

    def check(self, node: Node) -> None:
        """Raises `Unreadable` if a right answer, or one of its values, cannot be compared with anything."""
        node = spread(node)
        if node.op in STRUCTURED:
            for part in node.args:
                self.check(part)
        elif not is_infinite(node) and not self.equal_values(node, node):
            raise Unreadable(f"{node.op} has no value")

    def at_points(self, gold: Node, given: Node, value: At) -> list[tuple[Value, Value]]:
        """The pairs of values at the points where both have one; [] if only the right answer has one at some
        point.

        If the right answer is real at enough points, only those count: sqrt(x) is compared where x is not
        negative.
        """
        names = sorted(names_in(gold) | names_in(given))
        pairs: list[tuple[Value, Value]] = []
        failure: Unreadable | None = None
        for index in range(NUM_POINTS if names else 1):
            # Draw the point: a fraction for each name.
            draw = random.Random(hashlib.blake2b(f"{self.seed}/{index}".encode(errors="replace")).digest())
            signs = (*SIGNS[index], *(draw.choice((-1, 1)) for _ in names))
            point = {name: sign * Fraction(draw.randrange(2, 500), draw.randrange(3, 100)) for name, sign in zip(names, signs)}

            # Evaluate both there.
            try:
                right = value(gold, point)
            except Unreadable as error:
                failure = error
                continue
            try:
                pairs.append((right, value(given, point)))
            except Unreadable:
                return []
        if not pairs and failure is not None:
            raise failure
        real = [pair for pair in pairs if is_real(pair[0])]
        return real if len(real) >= MIN_POINTS else pairs


def difference(node: Node, point: Mapping[str, Fraction]) -> Value:
    """The left side of an equation minus the right side."""
    return evaluate(Node("add", (node.args[0], Node("neg", (node.args[1],)))), point)


def is_named(name: Node, values: Sequence[Node]) -> bool:
    """Is this a name for the other side of the equation? x in x = 5, f(x) in f(x) = 2x."""
    if name.op == "mul" and all(part.op == "name" for part in name.args) and str(name.args[0].value) in "fghpqFGPQAV":
        name = name.args[0]
    return name.op == "name" and all(str(name.value) not in names_in(value) for value in values)


def solved(node: Node) -> tuple[Node, str, Node] | None:
    """(x, ">", 5) for x > 5 and for 5 < x: a name, a sign, a value without names. None for the rest."""
    if node.op != "relation" or len(node.args) != 2:
        return None
    (left, right), sign = node.args, str(node.value)
    if left.op == "name" and not names_in(right):
        return left, sign, right
    return (right, REVERSED[sign], left) if right.op == "name" and not names_in(left) else None


def names_in(node: Node) -> frozenset[str]:
    if node.op == "name":
        return frozenset([str(node.value)])
    return frozenset().union(*map(names_in, node.args))


def is_plain(node: Node) -> bool:
    """Is this a number without arithmetic: whole, decimal, fraction, mixed, scientific; maybe negative?"""
    match node.op, node.args:
        case ("number", _):
            return True
        case ("neg", (inner,)):
            return inner.op != "neg" and is_plain(inner)
        case ("div", (top, bottom)):
            return is_whole(top.args[0] if top.op == "neg" else top) and is_whole(bottom)
        case ("mixed", (whole, Node("div", (top, bottom)))):  # 48 24/1 would be a sum left to do
            return all(map(is_whole, (whole, top, bottom))) and 0 < evaluate(top, {}) < evaluate(bottom, {})
        case ("mul", (a, b)):
            a = a.args[0] if a.op == "neg" else a
            if node.value == "scale":
                return is_plain(a) and (a.op in ("number", "mixed") or a.value == "scale")
            return a.op == "number" and is_power_of_ten(b)
    return is_power_of_ten(node)


def is_whole(node: Node) -> bool:
    return node.op == "number" and isinstance(node.value, Fraction) and node.value.denominator == 1


def is_undone(node: Node) -> bool:
    """Is this a division with a whole result: 48/2 for 24?"""
    inner = node.args[0] if node.op == "neg" else node
    return inner.op == "div" and evaluate(inner, {}).denominator == 1


def is_infinite(node: Node) -> bool:
    inner = node.args[0] if node.op == "neg" else node
    return inner.op == "const" and inner.value == "infty"


def is_power_of_ten(node: Node) -> bool:
    if node.op != "pow" or node.args[0] != Node("number", (), Fraction(10)):
        return False
    exponent = node.args[1].args[0] if node.args[1].op == "neg" else node.args[1]
    return exponent.op == "number"


def unit_of(node: Node) -> tuple[Node, str]:
    """(the value without its unit, the unit as words)"""
    if node.op == "degree":
        return node.args[0], "degree"
    if node.op != "quantity":
        return node, ""
    return unit_of(node.args[0])[0], str(node.value)


def spread(node: Node) -> Node:
    """Expands +- into a list of two values."""
    if node.op == "list":
        parts = [spread(part) for part in node.args]
        return Node("list", tuple(value for part in parts for value in (part.args if part.op == "list" else (part,))))
    if node.op in ("relation", "bracket", "set", "union", "matrix", "row"):
        parts = [spread(part) for part in node.args]
        if node.op == "relation" and parts[-1].op == "list" and len(parts) == 2:
            return Node("list", tuple(Node("relation", (parts[0], value), node.value) for value in parts[-1].args))
        return node
    if not has_pm(node):
        return node
    return Node("list", (signed(node, "add"), signed(node, "subtract")))


def has_pm(node: Node) -> bool:
    return node.op == "pm" or any(map(has_pm, node.args))


def signed(node: Node, sign: str) -> Node:
    args = tuple(signed(arg, sign) for arg in node.args)
    if node.op != "pm":
        return Node(node.op, args, node.value)
    return Node("add", (args[0], args[1] if sign == "add" else Node("neg", (args[1],))))


def turned(node: Node) -> tuple[Node, list[str]]:
    """(the relation, its signs), reversed if need be so that it reads < and not >."""
    signs = str(node.value).split()
    if signs[0] in (">", ">="):
        return Node("relation", node.args[::-1], " ".join(REVERSED[s] for s in signs[::-1])), [REVERSED[s] for s in signs[::-1]]
    return node, signs


def as_region(node: Node, wanted: str) -> Node:
    """Turns x > 5 into (5, infinity) if a "bracket" is wanted, "x < 1 or x > 3" into a union."""
    if node.op == "list" and wanted == "union":
        parts = tuple(as_region(part, "bracket") for part in node.args)
        return Node("union", parts) if all(part.op == "bracket" for part in parts) else node
    if node.op != "relation" or wanted != "bracket":
        return node

    # name < value, value < name, value < name < value.
    node, signs = turned(node)
    args, far = node.args, Node("const", (), "infty")
    if set(signs) - {"<", "<="}:
        return node
    if len(args) == 2 and args[0].op == "name" and not names_in(args[1]):
        return Node("bracket", (Node("neg", (far,)), args[1]), "(" + ")]"[signs[0] == "<="])
    if len(args) == 2 and args[1].op == "name" and not names_in(args[0]):
        return Node("bracket", (args[0], far), "(["[signs[0] == "<="] + ")")
    if len(args) == 3 and args[1].op == "name" and not names_in(args[0]) | names_in(args[2]):
        return Node("bracket", (args[0], args[2]), "(["[signs[0] == "<="] + ")]"[signs[1] == "<="])
    return node
