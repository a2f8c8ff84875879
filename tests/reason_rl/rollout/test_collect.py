"""The join of engine and verifiers: completions are graded while others are still being sampled, and come back to their groups."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from reason_rl.config import Config, EngineConfig, ModelConfig, RewardConfig, RLConfig, TaskConfig
from reason_rl.data import char_tokenizer
from reason_rl.model.transformer import Transformer
from reason_rl.parallel.world import World
from reason_rl.records import SamplingParams
from reason_rl.reward import Grader
from reason_rl.rollout.collect import EVAL_KEY, Session, build_session, collect_groups, evaluate, sample_and_grade
from tests.reason_rl.tiny import grade_group

CONFIG = Config(
    model=ModelConfig(num_hidden_layers=1, hidden_size=32, num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_experts=1, moe_intermediate_size=32,
                      max_position_embeddings=64),
    task=TaskConfig(min_level=2, max_level=3, heldout_share=0.1, rl_share=0.2), rl=RLConfig(prompts_per_step=4, group_size=4),
    sampling=SamplingParams(max_tokens=24), engine=EngineConfig(max_num_seqs=6),
    reward=RewardConfig(custom="tests.reason_rl.run.train_rewards:by_hash"))


@pytest.fixture
def session() -> Iterator[Session]:
    tokenizer = char_tokenizer()
    model = Transformer(CONFIG.model, tokenizer.vocab_size).initialise(0)
    session = build_session(CONFIG, World(0, 1, torch.device("cpu"), torch.float32), tokenizer, model)
    yield session
    session.grader.close()


def test_completions_are_graded_while_others_are_sampled(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    submit, generate = session.grader.submit, session.engine.generate

    def submit_and_note(*given: Any) -> Any:
        events.append("submitted")
        return submit(*given)

    def generate_and_note(*given: Any, **more: Any) -> Any:
        groups = generate(*given, **more)
        events.append("all sampled")
        return groups

    monkeypatch.setattr(session.grader, "submit", submit_and_note)
    monkeypatch.setattr(session.engine, "generate", generate_and_note)
    problems = session.draw_problems(0, 4, 0, ())
    groups, seconds = sample_and_grade(session, problems, 4, session.sampling, 0)
    assert events == ["submitted"] * 16 + ["all sampled"]
    assert seconds.keys() == {"rollout_s", "reward_s"} and [group.problem for group in groups] == problems
    assert all(score.is_graded and "custom" in score.parts for group in groups for score in group.scores)


def test_scores_are_those_of_the_finished_groups(session: Session) -> None:
    groups, _ = sample_and_grade(session, session.draw_problems(0, 4, 0, ()), 4, session.sampling, 0)
    reasons = {completion.finish_reason for group in groups for completion in group.completions}
    assert reasons == {"stop", "length"}  # both ways of ending were seen
    with Grader(CONFIG, session.tokenizer) as grader:
        for group in groups:
            assert grade_group(replace(group, scores=()), grader) == group


def test_each_of_several_end_tokens_ends_a_completion(session: Session) -> None:
    session.stop_ids = (session.tokenizer.eos_id, *session.tokenizer.encode("abc<"))
    groups, _ = sample_and_grade(session, session.draw_problems(0, 4, 0, ()), 4, session.sampling, 0)
    ended = [c.token_ids for group in groups for c in group.completions if c.finish_reason == "stop"]
    assert len({ids[-1] for ids in ended}) > 1 and all(set(session.stop_ids) & set(ids) == {ids[-1]} for ids in ended)


def test_a_problem_that_is_drawn_twice_has_its_own_scores(session: Session) -> None:
    problem = session.draw_problems(0, 1, 0, ())[0]
    groups, _ = sample_and_grade(session, [problem, replace(problem)], 2, session.sampling, 0)
    assert len(groups) == 2 and groups[0].scores == groups[1].scores  # same noise, same completions


def test_a_step_says_what_its_verifiers_did_and_an_evaluation_is_not_counted(session: Session) -> None:
    evaluate(session, 0, 4, 2)
    _, everything, timings = collect_groups(session, 0)
    assert timings["verifier/gradings"] == 2 * sum(len(group.completions) for group in everything)  # text and custom
    assert timings["verifier/gradings_per_s"] > 0 and timings["verifier/deadlines_met"] == 1.0
    assert timings["verifier/worker_restarts"] == 0 and timings["verifier/queue_peak"] >= 1


def test_a_verifier_that_dies_leaves_its_completion_ungraded_and_the_step_goes_on(session: Session) -> None:
    session.grader.close()
    session.config = replace(CONFIG, reward=RewardConfig(custom="tests.reason_rl.run.train_rewards:dies_at_times"))
    session.grader = Grader(session.config, session.tokenizer)
    groups, _ = sample_and_grade(session, session.draw_problems(0, 4, 0, ()), 4, session.sampling, EVAL_KEY)
    graded = [score.is_graded for group in groups for score in group.scores]
    assert 0 < sum(graded) < len(graded)
    assert {score.cause for group in groups for score in group.scores} == {"", "custom crash: the worker died: exit status 3"}
