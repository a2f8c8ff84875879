"""Sampling and grading joined: completions are graded while others are still sampled, and return to their groups."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from reason_rl.config import Config, EngineConfig, ModelConfig, RewardConfig, TaskConfig
from reason_rl.data import TooFewProblems, char_tokenizer, load_problems
from reason_rl.engine import Engine
from reason_rl.model.transformer import Transformer
from reason_rl.parallel.world import World
from reason_rl.records import Completion, Group, Problem, SamplingParams, Score
from reason_rl.report.clock import Clock
from reason_rl.reward import Grader
from reason_rl.rl.advantages import has_signal
from reason_rl.rollout.collect import collect, refill

CONFIG = Config(
    model=ModelConfig(num_hidden_layers=1, hidden_size=32, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
                      num_experts=1, intermediate_size=32, max_position_embeddings=64),
    task=TaskConfig(min_level=2, max_level=3, heldout_share=0.1, rl_share=0.2), engine=EngineConfig(max_num_seqs=6),
    sampling=SamplingParams(max_tokens=24), reward=RewardConfig(custom="tests.reason_rl.run.train_rewards:by_hash"))
TOKENIZER = char_tokenizer()
SAMPLING = replace(CONFIG.sampling, stop_ids=TOKENIZER.stop_ids)
WORLD = World(0, 1, torch.device("cpu"), torch.float32)
PROBLEMS = load_problems(CONFIG, TOKENIZER).train(0, 4)
"""Sampled 4 times each below, 6 at a time."""


@pytest.fixture(scope="module")
def engine() -> Engine:
    model = Transformer(CONFIG.model, TOKENIZER.vocab_size).initialise(0).requires_grad_(False)
    return Engine(model, CONFIG.engine, CONFIG.run.seed)


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(CONFIG, TOKENIZER) as grader:
        yield grader


class SlowPending:
    """A verdict that is ready at the call of `score`, or at the test's `tick`."""

    def __init__(self, grader: ManualGrader, completion: Completion) -> None:
        self.grader, self.completion, self.is_done = grader, completion, False

    def score(self) -> Score:
        if not self.is_done:
            self.grader.num_waits += 1
        return Score(float(self.completion.sample_index), {})


class ManualGrader:
    """Grades a completion once `delay` further ones were submitted."""

    def __init__(self, delay: int) -> None:
        self.delay, self.num_waits, self.pending = delay, 0, list[SlowPending]()

    def submit(self, problem: Problem, completion: Completion) -> SlowPending:
        self.pending.append(SlowPending(self, completion))
        for one in self.pending[: max(0, len(self.pending) - self.delay)]:
            one.is_done = True
        return self.pending[-1]


def gather(engine: Engine, grader: Any, problems: Sequence[Problem] = PROBLEMS, group_size: int = 4, **more: Any) -> list[Group]:
    return collect(engine, grader, problems, group_size, SAMPLING, **{"world": WORLD, "step": 0, **more})


def test_completions_are_graded_while_others_are_sampled(
    engine: Engine, grader: Grader, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    submit, generate = grader.submit, engine.generate

    def submit_and_note(*given: Any) -> Any:
        events.append("submitted")
        return submit(*given)

    def generate_and_note(*given: Any, **more: Any) -> Any:
        groups = generate(*given, **more)
        events.append("all sampled")
        return groups

    monkeypatch.setattr(grader, "submit", submit_and_note)
    monkeypatch.setattr(engine, "generate", generate_and_note)
    groups = gather(engine, grader)
    assert events == ["submitted"] * 16 + ["all sampled"] and [group.problem for group in groups] == PROBLEMS
    assert all(score.is_graded and "custom" in score.parts for group in groups for score in group.scores)


def test_scores_are_those_of_the_completions(engine: Engine, grader: Grader) -> None:
    groups = gather(engine, grader)
    reasons = {completion.finish_reason for group in groups for completion in group.completions}
    assert reasons == {"stop", "length"}  # both finish reasons occur
    for group in groups:
        assert group.scores == tuple([grader.submit(group.problem, completion).score() for completion in group.completions])


def test_each_of_several_end_tokens_ends_a_completion(engine: Engine, grader: Grader) -> None:
    stop_ids = (TOKENIZER.eos_id, *TOKENIZER.encode("abc<"))
    groups = collect(engine, grader, PROBLEMS, 4, replace(SAMPLING, stop_ids=stop_ids), world=WORLD, step=0)
    ended = [c.token_ids for group in groups for c in group.completions if c.finish_reason == "stop"]
    assert len({ids[-1] for ids in ended}) > 1 and all(set(stop_ids) & set(ids) == {ids[-1]} for ids in ended)


def test_a_problem_that_occurs_twice_gets_two_equal_groups(engine: Engine, grader: Grader) -> None:
    groups = gather(engine, grader, [PROBLEMS[0], replace(PROBLEMS[0])], 2)
    assert len(groups) == 2 and groups[0].completions == groups[1].completions  # same noise
    assert groups[0].scores == groups[1].scores


def test_groups_are_passed_on_once_each_as_they_are_graded(engine: Engine) -> None:
    events: list[object] = []
    groups = gather(engine, ManualGrader(delay=1), on_completion=lambda problem, completion: events.append(problem.problem_id),
                    on_group=events.append)
    passed_on = [event for event in events if isinstance(event, Group)]
    assert sorted(passed_on, key=lambda group: PROBLEMS.index(group.problem)) == groups
    assert len(events) == 16 + 4 and isinstance(events[-1], Group) and not isinstance(events[-2], Group)  # only the last waits
    for group in passed_on:
        earlier = events[: events.index(group)]
        assert earlier.count(group.problem.problem_id) == 4  # after its completions
    finished = [max(place for place, event in enumerate(events) if event == group.problem.problem_id) for group in passed_on]
    assert finished == sorted(finished)


def test_a_group_that_is_graded_early_waits_for_those_sampled_before_it(engine: Engine) -> None:
    class FirstIsLast(ManualGrader):
        def submit(self, problem: Problem, completion: Completion) -> SlowPending:
            pending = super().submit(problem, completion)
            pending.is_done = problem.problem_id != PROBLEMS[0].problem_id
            return pending

    passed_on: list[Group] = []
    slow = FirstIsLast(delay=100)
    gather(engine, slow, on_group=passed_on.append)
    place = [group.problem for group in passed_on].index(PROBLEMS[0])
    assert slow.num_waits == 4 and place < 3


def test_after_an_interrupt_the_groups_that_are_fully_sampled_are_passed_on(engine: Engine) -> None:
    passed_on: list[Group] = []
    count = [0]

    def interrupt(problem: Problem, completion: Completion) -> None:
        count[0] += 1
        if count[0] == 12:
            raise KeyboardInterrupt

    slow = ManualGrader(delay=100)
    with pytest.raises(KeyboardInterrupt):
        gather(engine, slow, on_group=passed_on.append, on_completion=interrupt)
    assert 0 < len(passed_on) < 4 and all(len(group.scores) == 4 for group in passed_on)
    waits, count[0] = slow.num_waits, 0
    with pytest.raises(KeyboardInterrupt):
        gather(engine, slow, on_completion=interrupt)  # a trainer's: it does not wait
    assert slow.num_waits == waits


def test_the_wait_for_the_last_verdicts_is_counted_as_reward(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    class Costly(ManualGrader):
        def submit(self, problem: Problem, completion: Completion) -> SlowPending:
            now[0] += 1.0
            return super().submit(problem, completion)

    monkeypatch.setattr(SlowPending, "score", lambda self: now.__setitem__(0, now[0] + 100.0) or Score(0.0, {}))
    clock = Clock()
    gather(engine, Costly(delay=100), clock=clock)
    assert clock.seconds == {"rollout": 16.0, "reward": 1600.0}


def test_ranks_share_the_problems_and_each_gets_all_groups(engine: Engine, grader: Grader) -> None:
    class HalfWorld(World):
        """Rank `rank` of 2; gathers the known results of the other rank."""

        def gather(self, value: Any) -> list[Any]:
            parts.append(value)
            return [value if rank == self.rank else whole[rank] for rank in range(2)]

    alone = gather(engine, grader)
    whole, parts = [alone[0::2], alone[1::2]], list[list[Group]]()
    for rank in (0, 1):
        assert gather(engine, grader, world=HalfWorld(rank, 2, WORLD.device, WORLD.dtype)) == alone
    assert parts == whole


def test_a_verifier_that_dies_leaves_its_completion_ungraded(engine: Engine) -> None:
    config = replace(CONFIG, reward=RewardConfig(custom="tests.reason_rl.run.train_rewards:dies_at_times"))
    with Grader(config, TOKENIZER) as dying:
        groups = gather(engine, dying, step=1)
    graded = [score.is_graded for group in groups for score in group.scores]
    assert 0 < sum(graded) < len(graded)
    assert {score.cause for group in groups for score in group.scores} == {"", "custom crash: the worker died: exit status 3"}


def group(problem_id: int, *rewards: float | None) -> Group:
    """None: ungraded."""
    scores = tuple(Score(value or 0.0, {}, is_graded=value is not None) for value in rewards)
    return Group(Problem(problem_id, "test", "", (1,), ""), (), scores)


@pytest.mark.parametrize(("rewards", "expected"), [
    ((0.0, 1.0), True), ((1.0, 1.0), False), ((1.0, None), False), ((None, None), False), ((0.0, None, 1.0), True),
    ((1.0, 1.0 + 1e-12), False),  # equal in f32, in which advantages are taken
])  # fmt: skip
def test_a_group_has_signal_if_two_graded_rewards_differ(rewards: tuple[float | None, ...], expected: bool) -> None:
    assert has_signal(group(1, *rewards)) is expected


class Task:
    """Problems 0, 1, 2, ...; those in `dull` give groups without signal. Four of them are a batch."""

    def __init__(self, dull: Collection[int], num_problems: int = 100) -> None:
        self.dull, self.num_problems, self.asked = dull, num_problems, list[tuple[int, int, int]]()

    def draw(self, count: int, round_number: int, exclude: Collection[int]) -> list[Problem]:
        self.asked.append((count, round_number, len(exclude)))
        left = [n for n in range(self.num_problems) if n not in exclude]
        if len(left) < count:
            raise TooFewProblems(f"{count} asked for, {len(left)} left")
        return [group(n).problem for n in left[:count]]

    def sample(self, problems: Sequence[Problem]) -> list[Group]:
        return [group(p.problem_id, 1.0, 1.0 if p.problem_id in self.dull else 0.0) for p in problems]

    def refill(self, max_rounds: int) -> tuple[list[int], list[int]]:
        """-> (ids of the batch, ids of all that were sampled)"""
        sampled = self.sample([group(n).problem for n in range(4)])
        batch = refill(sampled, max_rounds, draw=self.draw, sample=self.sample)
        return [g.problem.problem_id for g in batch], [g.problem.problem_id for g in sampled]


def test_groups_without_signal_are_replaced_by_fresh_problems() -> None:
    task = Task(dull={0, 2, 4})
    assert task.refill(5) == ([1, 3, 5, 6], [0, 1, 2, 3, 4, 5, 6])
    assert task.asked == [(2, 1, 4), (1, 2, 6)]


def test_a_batch_with_signal_is_not_refilled() -> None:
    task = Task(dull=())
    assert task.refill(5) == ([0, 1, 2, 3], [0, 1, 2, 3]) and task.asked == []


def test_after_the_last_round_groups_without_signal_fill_the_batch() -> None:
    assert Task(dull={0, 2, 4, 5, 6}).refill(1) == ([1, 3, 0, 2], [0, 1, 2, 3, 4, 5])
    task = Task(dull=range(100))
    assert task.refill(2)[0] == [0, 1, 2, 3] and len(task.asked) == 2


def test_a_task_without_further_problems_ends_the_rounds() -> None:
    assert Task(dull={0, 2}, num_problems=5).refill(5) == ([1, 3, 0, 2], [0, 1, 2, 3])


def test_another_error_in_drawing_is_not_taken_for_the_end_of_the_problems() -> None:
    def draw(*given: object) -> list[Problem]:
        raise ValueError("too few problems: only the text of TooFewProblems")

    task = Task(dull={0})
    with pytest.raises(ValueError, match="only the text"):
        refill(task.sample([group(n).problem for n in range(4)]), 2, draw=draw, sample=task.sample)
