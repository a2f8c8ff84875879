"""The stages alone, on a tiny random model: what a step takes and gives, and when an evaluation is due."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from reason_rl.config import Config, load_config
from reason_rl.data import char_tokenizer, load_problems
from reason_rl.model.transformer import Transformer
from reason_rl.parallel.world import init_world
from reason_rl.records import Group
from reason_rl.rollout.collect import EVAL_KEY
from reason_rl.run.recipe import plan_recipe
from reason_rl.stages import STAGES
from reason_rl.stages.base import StageStart
from reason_rl.stages.grpo import Grpo
from reason_rl.stages.heldout import evaluate_heldout
from reason_rl.stages.pretrain import Pretrain
from tests.reason_rl.run.tiny_run import arguments


class RandomStart(StageStart):
    def load(self) -> Transformer:
        return Transformer(self.config.model, self.tokenizer.vocab_size).initialise(0)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load_config(arguments(tmp_path)[0])


def start(config: Config, offset: int = 0) -> StageStart:
    tokenizer = char_tokenizer()
    return RandomStart(config, init_world(config.run), tokenizer, load_problems(config, tokenizer), offset, None, None)


def prompts(groups: tuple[Group, ...]) -> list[str]:
    return [group.problem.prompt for group in groups]


def test_every_stage_has_its_own_kind_and_its_steps_are_known_before_it_is_built(config: Config):
    assert {name: stage.kind for name, stage in STAGES.items()} == {"pretrain": "pretrain", "grpo": "grpo"}
    assert Pretrain.num_steps_of(config) == 24 and Grpo.num_steps_of(config) == 5


def test_a_grpo_step_samples_grades_and_updates(config: Config):
    stage = Grpo(start(config))
    before = stage.policy.model.head_weight.detach().clone()
    stats = stage.step(0)
    stage.close()
    assert len(stats.groups) == 4 and {len(group.completions) for group in stats.groups} == {4}
    assert stats.metrics["max_abs_logprob_gap"] == 0.0 and stats.metrics["num_loss_tokens"] > 0
    assert not torch.equal(before, stage.policy.model.head_weight.detach()) and stage.policy.version == 2
    assert {"rollout_s", "reward_s", "train_s", "step_s"} <= stats.timings.keys()


def test_a_stage_after_another_continues_its_problems_and_noise(config: Config):
    """With offset 1, step 0 is step 1 of an unbroken stage, but for what the first update changed."""
    first, second = Grpo(start(config)), Grpo(start(config, offset=1))
    zero = prompts(first.step(0).groups)
    one, shifted = prompts(first.step(1).groups), prompts(second.step(0).groups)
    first.close()
    second.close()
    assert one == shifted != zero


def test_the_offset_counts_the_steps_of_earlier_stages_that_use_problems(tmp_path: Path):
    path = tmp_path / "three.toml"
    path.write_text("""
[[stage]]
kind = "pretrain"
[[stage]]
kind = "grpo"
name = "a"
[stage.rl]
steps = 7
[[stage]]
kind = "grpo"
name = "b"
[[stage]]
kind = "grpo"
name = "c"
after = "a"
""", encoding="utf-8")
    assert [stage.offset for stage in plan_recipe(load_config(path, ["--b.rl.steps=3"]))] == [0, 0, 7, 7]


@pytest.mark.parametrize(("num_done", "count", "keys"), [
    (0, 8, [EVAL_KEY + 10, 2 * EVAL_KEY + 10]), (1, None, []), (2, 6, [EVAL_KEY + 12]), (5, 8, [EVAL_KEY + 15, 2 * EVAL_KEY + 15]),
])
def test_an_evaluation_is_whole_at_both_ends_and_due_every_so_many_steps_between(
    config: Config, num_done: int, count: int | None, keys: list[int]
):
    asked: list[tuple[int, int]] = []

    def collect(problems, group_size, sampling, key, clock):
        asked.append((len(problems), key))
        assert (sampling.temperature, sampling.top_p, sampling.top_k) == (1.0, 1.0, 0)  # nothing is cut
        return []

    sampling = dataclasses.replace(config.sampling, temperature=0.5, top_p=0.9, top_k=3)
    tokenizer = char_tokenizer()
    metrics = evaluate_heldout(config.eval, load_problems(config, tokenizer), sampling, tokenizer, collect, num_done, 5, offset=10)
    assert [key for _, key in asked] == keys
    assert metrics is None if count is None else asked[0][0] == count


def test_a_pretraining_step_lowers_the_loss_and_counts_its_tokens(config: Config):
    stage = Pretrain(start(config))
    lines = [stage.step(index).metrics for index in range(12)]
    assert lines[-1]["loss"] < lines[0]["loss"] and stage.policy.version == 12
    tokens = [line["tokens"] for line in lines]
    assert all(0 < after - before <= config.pretrain.tokens_per_step for before, after in zip([0, *tokens], tokens, strict=False))
