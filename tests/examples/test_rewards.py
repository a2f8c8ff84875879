"""examples/rewards: each reward follows its formula, and a config can name it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from examples.rewards import cosine, language, repetition
from reason_rl.config import load_config
from reason_rl.records import Problem
from reason_rl.reward import check_rewards
from tests.reason_rl.reward.texts import grade

ROOT = Path(__file__).resolve().parents[2]
ENGLISH = "How many apples are left when you have eaten the half of them?"
GERMAN = "Wie viele Äpfel sind noch da, wenn man die Hälfte von ihnen gegessen hat?"


def problem(prompt: str, answer: str = "5") -> Problem:
    return Problem(problem_id=1, task="jsonl", prompt=prompt, prompt_ids=(1,), answer=answer)


@pytest.mark.parametrize("name", ["language", "repetition", "cosine"])
def test_the_command_that_an_example_shows_is_one_that_a_run_accepts(name: str) -> None:
    (arguments,) = re.findall(r"\.venv/bin/python train\.py (.*)", (ROOT / f"examples/rewards/{name}.py").read_text())
    preset, _, keys = arguments.partition("--name")
    config = load_config(ROOT / preset.strip() if preset else None, [word for word in keys.split() if word.startswith("--")])
    assert config.reward.custom.startswith(f"examples.rewards.{name}:")
    assert check_rewards(config, problem("2+3?")) == []


def test_an_example_is_called_with_what_it_asks_for() -> None:
    reward = {"custom": "examples.rewards.cosine:cosine", "custom_weight": 2.0, "accuracy": 0.0, "format": 0.0}
    config = load_config(None, ["--sampling.max_tokens=20", *(f"--reward.{key}={value}" for key, value in reward.items())])
    right, wrong, cut = (grade(problem("2+3?"), text, config, num_tokens=10, finish_reason=reason) for text, reason in
                         ((r"\boxed{5}", "stop"), (r"\boxed{6}", "stop"), (r"\boxed{5}", "length")))
    assert right.value == pytest.approx(2 * 0.75, abs=1e-12)  # half of the way from 1 to 0.5
    assert wrong.value == pytest.approx(2 * -0.75, abs=1e-12) and cut.value == -2.0
    unreadable = grade(problem("2+3?", answer="1/0"), r"\boxed{5}", config)
    assert not unreadable.is_graded


def test_the_cosine_reward_goes_from_its_short_end_to_its_long_one() -> None:
    expected = {(True, 0): 1.0, (True, 50): 0.75, (True, 100): 0.5, (False, 0): -1.0, (False, 50): -0.75, (False, 100): -0.5}
    for (is_right, num_tokens), value in expected.items():
        assert cosine.on_curve(is_right, num_tokens, 100, "stop") == pytest.approx(value, abs=1e-12)
        assert cosine.on_curve(is_right, num_tokens, 100, "length") == -1.0
    right = [cosine.on_curve(True, n, 100, "stop") for n in range(101)]
    assert right == sorted(right, reverse=True)


@pytest.mark.parametrize(("prompt", "thought", "low", "high"), [
    (ENGLISH, "We have eight of them, so that four are left and it is done.", 1.0, 1.0),
    (ENGLISH, "Wir haben acht, also sind es noch vier und das ist die Antwort.", 0.0, 0.1),
    (ENGLISH, "We have eight, also sind es noch vier.", 0.2, 0.8),
    (GERMAN, "Wir haben acht, also sind es noch vier und das ist die Antwort.", 0.9, 1.0),
    (GERMAN, "We have eight of them, so that four are left.", 0.0, 0.1),
    (ENGLISH, "Сначала мы делим восемь на два.", 0.0, 0.0),
    ("Сколько осталось яблок?", "Сначала мы делим восемь на два.", 1.0, 1.0),
    ("りんごは何個ありますか。", "りんごは八個の半分で四個です。", 1.0, 1.0),
    (ENGLISH, "\\frac{8}{2} = 4", 1.0, 1.0), ("8/2?", "Wir haben vier.", 1.0, 1.0), (ENGLISH, "", 1.0, 1.0),
    (ENGLISH, "x = 8, x/2 = 4 \\text{ und } y", 0.0, 0.9),
    ("How many apples are there?", "So we have two and three of them.", 1.0, 1.0), ("How many apples are there?", "两个苹果", 0, 0),
    ("苹果有几个?", "两个 and x = 5", 2 / 3 - 1e-9, 2 / 3 + 1e-9), ("How many?", "3+4=7", 1.0, 1.0),
    ("Wie viele Äpfel sind es, und wie ist das?", "The number is what we have.", 0.0, 0.0),
])
def test_the_language_of_the_thought_is_compared_with_the_prompts(prompt: str, thought: str, low: float, high: float) -> None:
    text = f"<think>{thought}</think><answer>der die das 苹果</answer>"
    assert low <= language.same_language(problem(prompt), text) <= high


def test_only_the_thought_counts_and_all_of_a_text_without_tags() -> None:
    assert language.same_language(problem(ENGLISH), "Сначала <think>we have it</think> восемь") == 1.0
    assert language.same_language(problem(ENGLISH), "Сначала мы делим") == 0.0
    assert language.same_language(problem(ENGLISH), "we have it</think> восемь") == 1.0


def test_repetition_is_the_share_of_ngrams_that_had_come_before() -> None:
    assert repetition.repetition("a b c a b d", 2) == pytest.approx(-1 / 5)
    assert repetition.repetition("a b a b a b", 2) == pytest.approx(-3 / 5)
    assert repetition.repetition("no no no no no no no no", 2) == pytest.approx(-6 / 7)
    assert repetition.repetition("a b", 3) == repetition.repetition("", 1) == 0.0
    assert repetition.repetition("四四四四", 2) == pytest.approx(-2 / 3)
    assert -1 < repetition.penalty("so " * 1000) < -0.99
