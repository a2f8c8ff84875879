"""Which names in a problem's tests are the program's: one function, classes for its arguments, or entry points."""

from __future__ import annotations

import pytest

from reason_rl.answers.program_names import program_names


@pytest.mark.parametrize(("source", "names"), [
    ("assert f(2) == 4", ["f"]), ("assert sum(10, 15) == 25", ["sum"]), ("assert set(f(1)) == {1}", ["f"]),
    ("assert math.isclose(f(2), 0.5)", ["f"]), ("from math import isclose\nassert isclose(f(2), 0.5)", ["f"]),
    ("def check(candidate):\n    assert candidate(2) == 4\ncheck(f)", ["f"]), ("s = Stack()\nassert s.pop() == 1", ["Stack"]),
    ("assert f([Pair(5, 24), Pair(27, 40)], 4) == 3", ["Pair", "f"]), ("assert f(Color.RED) == 3", ["Color", "f"]),
    ("root = Node(1)\nroot.left = Node(2)\nassert f(root) == 3 and root.left.x == 2", ["Node", "f"]),
])
def test_the_programs_names_are_found_in_the_tests(source: str, names: list[str]) -> None:
    assert sorted(program_names(source, ())[0]) == names


@pytest.mark.parametrize("source", [
    "assert isclose(f(2), 0.5)", "assert np.allclose(f(2), 0.5)", "x = f(2)\nassert isclose(x, 0.5)", "assertEqual(f(2), 4)",
    "def check(candidate):\n    assert isclose(candidate(2), 0.5)\ncheck(f)", "assert normal(f(2)) == 4", "assert f(2) == g(2)",
    "assert f(2) == EXPECTED", "assert f('ab') == Counter('ab')", "e = Counter('ab')\nassert f('ab') == e",
    "assert Approx(f(2), 0.5)", "x = f(2)\nassert Approx(x) == 0.5", "for e in [Counter('ab')]:\n    assert f('ab') == e",
    "def answer():\n    return f('ab')\nassert answer() == Counter('ab')", "assert abs(sum(1, 2) - 3) < 1", "assert True",
])
def test_tests_with_an_ambiguous_name_are_refused(source: str) -> None:
    with pytest.raises(ValueError, match=r"entry_points|no function of the program"):
        program_names(source, ())


def test_entry_points_decide_which_names_are_the_programs() -> None:
    assert program_names("assert decode(encode('a')) == 'a'", ["encode", "decode"])[0] == ["decode", "encode"]
    assert program_names("assert abs(sum(1, 2) - 3) < 1", ["sum"])[0] == ["sum"]
    for source in ("assert isclose(f(2), 0.5)", "assert 1 == 1", "f = 1\nassert f == 1"):
        with pytest.raises(ValueError, match="entry_points"):
            program_names(source, ["f"])
