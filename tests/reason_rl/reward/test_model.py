"""The reward model: its score, and the model as a kind of the verifier service."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from reason_rl.config import Config, ModelConfig, RewardConfig
from reason_rl.data import char_tokenizer
from reason_rl.model.transformer import Transformer
from reason_rl.model.weights import save_weights
from reason_rl.records import Problem
from reason_rl.reward.model import HEAD_FILE, load_reward_model, save_head
from tests.reason_rl.reward.texts import Texts, grade, make_grader

PROMPT, PROBLEM = "a2,b*3?", Problem(problem_id=1, task="program", prompt="a2,b*3?", prompt_ids=(1,), answer="6")


@pytest.fixture
def reward_model(tmp_path: Path) -> Path:
    """Tiny and random; its head looks at one hidden coordinate."""
    config = ModelConfig(num_hidden_layers=1, hidden_size=16, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
                         num_experts=1, intermediate_size=16, max_position_embeddings=48)
    tokenizer = char_tokenizer()
    save_weights(tmp_path, Transformer(config, tokenizer.vocab_size).initialise(0).state_dict(), config, tokenizer.vocab_size,
                 tokenizer.eos_id)
    tokenizer.save(tmp_path)
    save_head(tmp_path, torch.eye(16)[3] * 2, torch.tensor([0.5]))
    return tmp_path


def test_a_reward_models_score_is_its_heads_output_at_the_last_token(reward_model: Path) -> None:
    model = load_reward_model(str(reward_model))
    scores = [model.score(model.encode(PROMPT + text)) for text in ("<think></think><answer>6</answer>", "7", "8")]
    assert all(0 < score < 1 for score in scores) and len(set(scores)) == 3
    model.weight.zero_()
    assert model.score(model.encode(f"{PROMPT}7")) == pytest.approx(float(torch.sigmoid(torch.tensor(0.5))), abs=1e-6)
    load_reward_model.cache_clear()


def test_a_reward_model_is_one_more_kind(reward_model: Path) -> None:
    config = Config(reward=RewardConfig(model=str(reward_model), model_weight=3.0, accuracy=0.0, format=0.0))
    model, texts = load_reward_model(str(reward_model)), Texts()
    expected, opened = (model.score(model.encode(text)) for text in (f"{PROMPT}7", f"{PROMPT}<think>7"))
    load_reward_model.cache_clear()
    with make_grader(config, texts) as grader:
        scores = [grader.submit(PROBLEM, texts.completion(text)).score() for text in ("7", "7" * 60, "é")]
        prefixed = replace(PROBLEM, prompt=f"{PROMPT}<think>", completion_prefix="<think>")  # the prompt already ends with it
        assert grader.submit(prefixed, texts.completion("7")).score().parts["model"] == pytest.approx(opened, abs=1e-6)
    assert scores[0].parts["model"] == pytest.approx(expected, abs=1e-6)
    assert scores[0].value == pytest.approx(3 * expected, abs=1e-5)
    assert [score.is_graded for score in scores] == [True, False, False]
    assert scores[1].cause == "model unreadable: the reward model reads 1 to 48 tokens, got 67"
    assert scores[2].cause.startswith("model unreadable: character 'é'")


def test_a_reward_model_without_its_head_is_a_clear_error(reward_model: Path) -> None:
    (reward_model / HEAD_FILE).unlink()
    score = grade(PROBLEM, "7", Config(reward=RewardConfig(model=str(reward_model))))
    assert not score.is_graded and f"has no {HEAD_FILE}" in score.cause
    # Weights are loaded at the worker's start, which counts for no request's deadline.
    assert score.cause.startswith("model start: ")
