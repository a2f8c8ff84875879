"""Computes the value of a tree: an exact fraction if possible, else a complex number of 40 digits.

The caller assigns values to names, so that two expressions can be compared at points. Every operation that
could grow without bound (powers, factorials, functions of huge arguments) is bounded before it is computed. A
tree beyond a bound or without a value (1/0) raises `Unreadable`. Nothing here calls Python's eval.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import mpmath

from reason_rl.answers.math.tokens import Unreadable
from reason_rl.answers.math.tree import Node

Value = Any
"""Fraction or mpmath.mpc."""
mp = mpmath.mp.clone()
mp.dps = 40
MAX_BITS = 40_000
MAX_EXPONENT = 10_000
MAX_ARGUMENT = 10**6
MAX_FACTORIAL = 2500
RELATIVE_ERROR = mp.mpf(10) ** -20
"""Above the rounding of some hundred operations on 40 digits, far below any difference of two answers."""
ZERO = mp.mpf(10) ** -30
CONSTANTS = {"pi": mp.mpc(mp.pi), "e": mp.mpc(mp.e), "i": mp.mpc(0, 1)}


def evaluate(node: Node, names: Mapping[str, Fraction]) -> Value:
    """names: the value of each name. Raises `Unreadable`."""
    try:
        return _bounded(_value(node, names))
    except (ZeroDivisionError, OverflowError, ValueError, TypeError, RecursionError) as error:
        raise error if isinstance(error, Unreadable) else Unreadable(f"{node.op} has no value: {error}") from error


def are_equal(a: Value, b: Value) -> bool:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    a, b = _complex(a), _complex(b)
    scale = max(abs(a), abs(b))
    return bool((scale < ZERO and min(abs(a), abs(b)) == 0) or abs(a - b) <= RELATIVE_ERROR * scale)


def is_real(value: Value) -> bool:
    return isinstance(value, Fraction) or bool(abs(value.imag) <= RELATIVE_ERROR * abs(value))


def _value(node: Node, names: Mapping[str, Fraction]) -> Value:
    if node.op in ("number", "name"):
        return node.value if node.op == "number" else names[str(node.value)]
    if node.op == "const":
        if str(node.value) not in CONSTANTS:
            raise Unreadable(f"{node.value} is not a number")
        return CONSTANTS[str(node.value)]
    if node.op == "based":
        return _in_base(str(node.value), evaluate(node.args[0], names))
    args = [evaluate(arg, names) for arg in node.args]
    if node.op == "call":
        return _call(str(node.value), args)
    match node.op, args:
        case ("neg", [a]):
            return -a
        case ("add" | "mixed", [a, b]):
            return _apply(lambda x, y: x + y, a, b)
        case ("mul", [a, b]):
            return _apply(lambda x, y: x * y, a, b)
        case ("div", [a, b]):
            return _apply(lambda x, y: x / y, a, b)
        case ("pow", [a, b]):
            return _power(a, b)
        case ("root", [a, b]):
            return _root(a, b)
        case ("abs", [a]):
            return abs(a) if isinstance(a, Fraction) else mp.mpc(abs(a))
        case ("percent", [a]):
            return a / 100
        case ("degree", [a]):
            return _complex(a) * mp.pi / 180
        case ("factorial", [a]):
            return Fraction(math.factorial(_whole(a)))
        case ("binom", [a, b]):
            return Fraction(math.comb(_whole(a), _whole(b)))
        case ("quantity", [a]):
            return a
    raise Unreadable(f"expected a number, got {node.op}")


def _bounded(value: Value) -> Value:
    if isinstance(value, Fraction):
        if value.numerator.bit_length() + value.denominator.bit_length() > MAX_BITS:
            raise Unreadable(f"a number with more than {MAX_BITS} bits")
        return value
    if not (mp.isfinite(value.real) and mp.isfinite(value.imag)):
        raise Unreadable("a value that is not finite")
    return value


def _complex(value: Value) -> Value:
    return mp.mpc(mp.mpf(value.numerator) / value.denominator) if isinstance(value, Fraction) else mp.mpc(value)


def _apply(operation: Any, a: Value, b: Value) -> Value:
    both = isinstance(a, Fraction) and isinstance(b, Fraction)
    return operation(a, b) if both else operation(_complex(a), _complex(b))


def _power(a: Value, b: Value) -> Value:
    if abs(b) > MAX_EXPONENT:
        raise Unreadable(f"an exponent above {MAX_EXPONENT}")

    # Exact: a whole exponent, or a root (exact where the root is) and a whole exponent.
    if isinstance(a, Fraction) and isinstance(b, Fraction) and b.denominator == 1:
        if (a.numerator.bit_length() + a.denominator.bit_length()) * abs(b) > MAX_BITS:
            raise Unreadable(f"a power with more than {MAX_BITS} bits")
        return a ** int(b)
    if isinstance(a, Fraction) and isinstance(b, Fraction) and b.denominator <= 12:
        return _power(_root(a, Fraction(b.denominator)), Fraction(b.numerator))

    # In 40 digits. 0 to a negative power has no value.
    if a == 0:
        return Fraction(0) if _complex(b).real > 0 else a ** -1
    return mp.power(_complex(a), _complex(b))


def _root(a: Value, index: Value) -> Value:
    """An exact root if it is rational. An odd root of a negative number is the real one."""
    n = _whole(index)
    if n == 0:
        raise Unreadable("the 0th root")
    if isinstance(a, Fraction):
        if a < 0 and n % 2:
            return -_root(-a, index)
        if a >= 0:
            exact = Fraction(_int_root(a.numerator, n), _int_root(a.denominator, n))
            if exact**n == a:
                return exact
    return mp.root(_complex(a), n) if n != 2 else mp.sqrt(_complex(a))


def _int_root(a: int, n: int) -> int:
    """A candidate for the n-th root of a: the caller checks it."""
    if n == 2:
        return math.isqrt(a)
    guess = round(float(mp.root(a, n))) if a.bit_length() < 1000 else 1
    return max(1, guess)


def _whole(value: Value) -> int:
    if not isinstance(value, Fraction) or value.denominator != 1 or not 0 <= value <= MAX_FACTORIAL:
        raise Unreadable(f"expected a whole number from 0 to {MAX_FACTORIAL}")
    return int(value)


def _in_base(digits: str, base: Value) -> Fraction:
    whole, _, decimals = digits.partition(".")
    return Fraction(int(whole + decimals, _whole(base)), _whole(base) ** len(decimals))


def _call(name: str, args: list[Value]) -> Value:
    """A function of one argument; log may have a base as its second."""
    a = _complex(args[0])
    if abs(a) > MAX_ARGUMENT and name not in ("log", "ln"):
        raise Unreadable(f"{name} of more than {MAX_ARGUMENT}")
    if name == "log":
        return mp.log(a) / mp.log(_complex(args[1]) if len(args) > 1 else 10)
    if name in ("arcsin", "arccos", "arctan"):
        return mp.mpc(getattr(mp, name.replace("arc", "a"))(a))
    return mp.mpc(getattr(mp, name)(a))
