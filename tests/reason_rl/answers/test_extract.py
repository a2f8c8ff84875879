"""Finds the answer in a completion: one answer block, or math's documented rule."""

from __future__ import annotations

from reason_rl.answers.extract import extract_answer, find_answer

RIGHT = "<think>a2,b*3=6,c-1=5</think><answer>5</answer>"


def test_exactly_one_answer_block_is_an_answer() -> None:
    assert extract_answer(RIGHT) == "5"
    assert extract_answer("<answer>5</answer> and more") == "5"
    for text in ("5", "<answer>5", "5</answer>", "</answer>5<answer>", "<answer>5</answer><answer>5</answer>",
                 "<answer><answer>5</answer>", "<answer>5</answer></answer>", ""):
        assert extract_answer(text) is None


def test_the_answer_is_found_by_the_stated_rule() -> None:
    found = {"\\boxed{a{b}c}": "a{b}c", "\\boxed{\\{1\\}}": "\\{1\\}", "\\boxed 5": "5", "\\boxed": None, "\\boxed{": None,
             "\\boxed{}": None,
             "\\boxedx{5}": None, "#### 5\n#### 6 \n": "6", "####": None, "The ANSWER IS: 7. Or 8": "7",
             "answer = 3.5\nmore": "3.5",
             "</think> \\boxed{1}": "1", "\\boxed{1} </think>": None, "<answer>\\boxed{1} or \\boxed{2}</answer>": "2",
             "<answer>\\boxed{1</answer>": None, "<answer></answer>": None, "<answer>1": None, "\\fbox{3}": "3", "": None}
    assert {text: find_answer(text) for text in found} == found
