"""The format reward and the overlong penalty. More examples are in docs/rewards.md."""

from __future__ import annotations

import pytest

from reason_rl.reward.parts import format_reward, overlong_reward

RIGHT = "<think>a2,b*3=6,c-1=5</think><answer>5</answer>"


def test_the_template_earns_the_format_reward() -> None:
    assert format_reward(RIGHT, "stop") == 1.0
    assert format_reward("<think></think><answer></answer>", "stop") == 1.0
    assert format_reward("<think>9<b 8>3!</think><answer>1</answer>", "stop") == 1.0


@pytest.mark.parametrize("text", [
    "", "5", "<answer>5</answer>", "<think>a</think>", " " + RIGHT, RIGHT + " ", RIGHT + "<eos>", RIGHT + RIGHT,
    "<think>a</think>\n<answer>5</answer>", "<think>a</think>b<answer>5</answer>", "<think>a<answer>5</answer>",
    "<think><think>a</think><answer>5</answer>", "<think>a</think></think><answer>5</answer>",
    "<answer>5</answer><think>a</think>", "<think>a<answer>5</answer></think>", "<think>a</think><answer>5",
    "<think>a</think><answer>5</answer>6</answer>", "a</think><answer>5</answer>",
])
def test_anything_else_does_not(text: str) -> None:
    assert format_reward(text, "stop") == 0.0


def test_a_completion_cut_at_its_length_is_not_well_formed() -> None:
    assert format_reward(RIGHT, "length") == 0.0


def test_the_overlong_penalty_is_daposs_ramp() -> None:
    """Equation 13 with max 100 and buffer 20."""
    lengths = {1: 0.0, 80: 0.0, 81: -0.05, 90: -0.5, 99: -0.95, 100: -1.0}
    for length, penalty in lengths.items():
        assert overlong_reward(length, "stop", 100, 20) == pytest.approx(penalty, abs=1e-12)
    assert overlong_reward(100, "length", 100, 20) == -1.0
    assert overlong_reward(100, "stop", 100, 0) == 0.0
    assert overlong_reward(100, "length", 100, 0) == -1.0
