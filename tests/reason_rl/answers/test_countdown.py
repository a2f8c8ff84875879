"""Countdown: only an expression that uses each number once and hits the target is a solution; tricks fail."""

from __future__ import annotations

import pytest

from reason_rl.answers.countdown import is_countdown_solution


@pytest.mark.parametrize("text", [
    "(9-7)*8", " ( 9 - 7 ) * 8 ", "8*(9-7)", "((((9-7))))*8", "9*8-7*8", "(9-8)*16", "9-7*8", "(9-7)*8=16",
])
def test_only_expressions_with_each_number_once_that_hit_are_solutions(text: str) -> None:
    assert is_countdown_solution(text, [9, 8, 7], 16) == (text in ("(9-7)*8", " ( 9 - 7 ) * 8 ", "8*(9-7)",
                                                                   "((((9-7))))*8"))


def test_division_is_exact() -> None:
    assert is_countdown_solution("8/(3-8/3)", [3, 3, 8, 8], 24)
    assert is_countdown_solution("1/3*3", [1, 3, 3], 1)
    assert not is_countdown_solution("7/2", [7, 2], 3)
    assert not is_countdown_solution("9999/1000", [9999, 1000], 10)


def test_numbers_that_come_twice_are_used_twice() -> None:
    assert is_countdown_solution("6+6/6", [6, 6, 6], 7)
    assert not is_countdown_solution("6+6-5", [6, 6, 6], 7)
    assert not is_countdown_solution("6+1", [6, 6, 6], 7)
    assert not is_countdown_solution("6*6", [6, 6, 6], 36)


ATTACKS = {
    "power": "2**3", "floor division": "17//2", "modulo": "17%9", "name": "x", "true": "True", "call": "abs(8)",
    "implicit call": "8(1)", "attribute": "(8).real", "import": "__import__('os')", "lambda": "(lambda:8)()",
    "float": "8.0", "exponent": "8e0", "complex": "8j", "hexadecimal": "0x8", "underscore": "0_8", "leading zero": "08",
    "string": "'8'", "tuple": "8,", "list": "[8]", "comparison": "8==8", "shift": "8<<0", "bit or": "8|0", "not": "~8",
    "unary minus": "-(-8)", "unary plus": "+8", "empty": "", "blank": "   ", "only operators": "+-*/", "open": "(8",
    "close": "8)", "two expressions": "8 8", "new line": "8\n", "semicolon": "8;8", "comment": "8#", "walrus": "(a:=8)",
    "division by zero": "8/(0)", "hidden division by zero": "8/(8-8)", "arabic digit": "٨", "full-width digit": "８",
    "superscript": "8²", "full-width plus": "8＋0", "nul": "8\0",
    "huge number": "9" * 100, "huge product": "*".join(["9999"] * 30),
    "deep nesting": "(" * 60 + "8" + ")" * 60, "deeper nesting": "(" * 100_000 + "8" + ")" * 100_000,
    "long chain": "+".join(["1"] * 100_000), "many minuses": "-" * 120 + "8", "surrogate": "8\ud800",
}


@pytest.mark.parametrize("text", ATTACKS.values(), ids=ATTACKS.keys())
def test_tricks_are_no_solutions(text: str) -> None:
    for numbers in ([8], [8, 8], [8, 8, 8], [2, 3], [17, 2], [17, 9], [8, 0]):
        assert not is_countdown_solution(text, numbers, 8)


def test_the_plain_form_of_the_tricks_is_a_solution() -> None:
    """So the tests above fail because of the trick and not because of the numbers."""
    assert is_countdown_solution("8", [8], 8)
    assert is_countdown_solution("8+8-8", [8, 8, 8], 8)
    assert is_countdown_solution("8+0", [8, 0], 8)
