"""Language and repetition, and the reward model behind the service's door. Their examples are in docs/rewards.md."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from reason_rl.reward.language import language_reward
from reason_rl.reward.repetition import repetition_reward

from reason_rl.config import Config, ModelConfig, RewardConfig
from reason_rl.data import char_tokenizer
from reason_rl.model.transformer import Transformer
from reason_rl.model.weights import save_weights
from reason_rl.records import Problem
from reason_rl.reward import Grader
from reason_rl.reward.model import HEAD_FILE, load_reward_model, save_head

ENGLISH = "How many apples are left when you have eaten the half of them?"
GERMAN = "Wie viele Äpfel sind noch da, wenn man die Hälfte von ihnen gegessen hat?"


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
])
def test_the_language_of_the_thought_is_compared_with_the_prompts(prompt: str, thought: str, low: float, high: float) -> None:
    text = f"<think>{thought}</think><answer>der die das 苹果</answer>"
    assert low <= language_reward(prompt, text) <= high


def test_only_the_thought_counts_and_all_of_a_text_without_tags() -> None:
    assert language_reward(ENGLISH, "Сначала <think>we have it</think> восемь") == 1.0
    assert language_reward(ENGLISH, "Сначала мы делим") == 0.0
    assert language_reward(ENGLISH, "we have it</think> восемь") == 1.0


def test_repetition_is_the_share_of_ngrams_that_had_come_before() -> None:
    assert repetition_reward("a b c a b d", 2) == pytest.approx(-1 / 5)
    assert repetition_reward("a b a b a b", 2) == pytest.approx(-3 / 5)
    assert repetition_reward("a b", 3) == repetition_reward("", 1) == 0.0
    assert repetition_reward("四四四四", 2) == pytest.approx(-2 / 3)
    assert -1 < repetition_reward("so " * 1000, 5) < -0.99


PROMPT, PROBLEM = "a2,b*3?", Problem(problem_id=1, task="program", prompt="a2,b*3?", prompt_ids=(1,), answer="6")


@pytest.fixture
def reward_model(tmp_path: Path) -> Path:
    """Tiny and random; its head looks at one hidden coordinate."""
    config = ModelConfig(num_hidden_layers=1, hidden_size=16, num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_experts=1, intermediate_size=16,
                         max_position_embeddings=48)
    tokenizer = char_tokenizer()
    save_weights(tmp_path, Transformer(config, tokenizer.vocab_size).initialise(0).state_dict(), config, tokenizer.vocab_size,
                 tokenizer.eos_id)
    tokenizer.save(tmp_path)
    save_head(tmp_path, torch.eye(16)[3] * 2, torch.tensor([0.5]))
    return tmp_path


def test_a_reward_model_scores_what_its_head_says_of_the_last_token(reward_model: Path) -> None:
    model = load_reward_model(str(reward_model))
    scores = [model.score(PROMPT, text) for text in ("<think></think><answer>6</answer>", "7", "8")]
    assert all(0 < score < 1 for score in scores) and len(set(scores)) == 3
    model.weight.zero_()
    assert model.score(PROMPT, "7") == pytest.approx(float(torch.sigmoid(torch.tensor(0.5))), abs=1e-6)
    load_reward_model.cache_clear()


def test_a_reward_model_is_one_more_kind(reward_model: Path) -> None:
    config = Config(reward=RewardConfig(model=str(reward_model), model_weight=3.0, accuracy=0.0, format=0.0))
    expected, opened = (load_reward_model(str(reward_model)).score(prompt, "7") for prompt in (PROMPT, f"{PROMPT}<think>"))
    load_reward_model.cache_clear()
    with Grader(config) as grader:
        scores = [grader.submit(PROBLEM, text, 3, "stop").score() for text in ("7", "7" * 60, "é")]
        prefixed = replace(PROBLEM, prompt=f"{PROMPT}<think>", completion_prefix="<think>")  # it stands in the prompt already
        assert grader.submit(prefixed, "7", 3, "stop").score().parts["model"] == pytest.approx(opened, abs=1e-6)
    assert scores[0].parts["model"] == pytest.approx(expected, abs=1e-6)
    assert scores[0].value == pytest.approx(3 * expected, abs=1e-5)
    assert [score.is_graded for score in scores] == [True, False, False]
    assert scores[1].cause == "model unreadable: the reward model reads 1 to 48 tokens, got 67"
    assert scores[2].cause.startswith("model unreadable: character 'é'")


def test_a_reward_model_without_its_head_is_said(reward_model: Path) -> None:
    (reward_model / HEAD_FILE).unlink()
    with Grader(Config(reward=RewardConfig(model=str(reward_model)))) as grader:
        score = grader.submit(PROBLEM, "7", 3, "stop").score()
    assert not score.is_graded and f"has no {HEAD_FILE}" in score.cause
    assert score.cause.startswith("model start: ")  # weights are loaded at the worker's start, on no request's time
