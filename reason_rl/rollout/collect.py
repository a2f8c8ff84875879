"""A run's parts, joined: the one place besides the commands that knows engine, trainer, data and reward alike.

`Session` holds them; `collect_groups` is the first half of a GRPO step (problems -> rollouts -> rewards), `evaluate` measures the
policy on held-out problems. The second half of a step stands in train.py.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import torch

from kernels.grpo_loss.spec import LossSpec
from reason_rl.config import Config
from reason_rl.data import (
    Tokenizer,
    check_problems,
    corpus_documents,
    describe_problems,
    heldout_problems,
    problems_to_check,
    rl_problems,
)
from reason_rl.engine import Engine, check_fits
from reason_rl.model.transformer import Transformer
from reason_rl.parallel.fsdp import RolloutWeights, shard
from reason_rl.parallel.world import World
from reason_rl.records import Completion, Group, Problem, SamplingParams
from reason_rl.reward import Grader, Pending, check_rewards
from reason_rl.rl.advantages import has_signal
from reason_rl.rollout.metrics import eval_metrics, pass_at_powers
from reason_rl.trainer.optimizer import Optimizer

EVAL_KEY = 1 << 40
"""Added to the step in an evaluation's noise key, so that no evaluation shares noise with a rollout."""
CHECKED_DOCUMENTS = 512
"""Documents of the corpus that are drawn before any work, to see that they fit."""

DrawProblems = Callable[[int, int, int, Collection[int]], list[Problem]]
"""(step, count, round, ids to leave out) -> `count` problems: the same on every rank."""


@dataclass
class Session:
    config: Config
    world: World
    tokenizer: Tokenizer
    model: Transformer
    """What the optimizer updates; sharded when there are several processes."""
    optimizer: Optimizer
    weights: RolloutWeights
    engine: Engine
    grader: Grader
    """Its workers start with the first completion."""
    draw_problems: DrawProblems
    stop_ids: tuple[int, ...]
    reference: Transformer | None
    """The frozen policy of the KL penalty, a plain copy; None without one."""
    policy_version: int = 0

    @property
    def sampling(self) -> SamplingParams:
        return replace(self.config.sampling, stop_ids=self.stop_ids)

    @property
    def loss_spec(self) -> LossSpec:
        spec = self.config.loss
        return spec if spec.constant_length else replace(spec, constant_length=self.config.sampling.max_tokens)

    @property
    def max_gap(self) -> float:
        """How far the engine's logprobs may be from the trainer's on policy, in nats."""
        if self.config.run.exact == "on":
            return 0.0
        return self.config.rl.max_logprob_gap or math.inf

    def policy_changed(self) -> None:
        """After an update: the engine samples with the new weights."""
        self.policy_version += 1
        self.weights.refresh()


def build_session(
    config: Config, world: World, tokenizer: Tokenizer, model: Transformer,
    reference_state: dict[str, torch.Tensor] | None = None,
) -> Session:
    """From a plain model on the CPU; `reference_state` is the frozen policy's where that is not the model as given."""
    reference = None
    model.compute_dtype = world.dtype
    model.set_batch_invariant(config.run.exact != "off")
    if config.loss.kl_coef > 0:
        reference = Transformer(model.config, model.vocab_size, world.dtype)
        reference.load_state_dict(reference_state or model.state_dict())
        reference.set_batch_invariant(model.batch_invariant).to(world.device).requires_grad_(False)
    model.to(world.device)
    shard(model, world)
    weights = RolloutWeights(model, world)
    engine = Engine(weights.model, config.engine, config.run.seed)
    optimizer = Optimizer(model, config.optim)

    def draw_problems(step: int, count: int, round_number: int, exclude: Collection[int]) -> list[Problem]:
        return rl_problems(config, tokenizer, step, count, round_number, exclude=exclude)

    return Session(config, world, tokenizer, model, optimizer, weights, engine, Grader(config, tokenizer), draw_problems,
                   tokenizer.stop_ids, reference)


def check_task(config: Config, tokenizer: Tokenizer) -> list[str]:
    """Everything about the task that can fail, before any work: an empty task, prompts that do not fit, a missing reward, a sandbox
    that does not hold. -> what a run should say of it."""
    count = max(config.eval.final_problems, config.eval.problems)
    problems = problems_to_check(config, tokenizer, count)
    check_problems(problems, config)
    check_fits(problems, config.sampling.max_tokens, config.model.max_position_embeddings, config.engine.num_blocks)
    if not config.model.init_from:
        corpus_documents(config, tokenizer, 0, CHECKED_DOCUMENTS)  # raises where one does not fit
    return [*describe_problems(config, tokenizer)[0], *check_rewards(config, problems[0])]


def sample_and_grade(
    session: Session, problems: Sequence[Problem], group_size: int, sampling: SamplingParams, step: int, with_routed_experts: bool = False
) -> tuple[list[Group], dict[str, float]]:
    """Each rank samples and grades its share; every rank gets all groups, in order -> (groups, seconds).

    A completion goes to the verifiers as it ends, so that grading overlaps the sampling of the others; reward_s is what is left to
    wait for after the last of them.
    """
    start = time.perf_counter()
    pending: dict[tuple[int, int], Pending] = {}

    def submit(problem: Problem, completion: Completion) -> None:
        pending[id(problem), completion.sample_index] = session.grader.submit(problem, completion)

    mine = session.engine.generate(
        session.world.share(problems), group_size, sampling, step=step, policy_version=session.policy_version, on_finish=submit,
        with_routed_experts=with_routed_experts)
    sampled = time.perf_counter()
    graded = [group.with_scores(tuple(pending[id(group.problem), c.sample_index].score() for c in group.completions))
              for group in mine]
    reward_s = time.perf_counter() - sampled
    groups = session.world.gather_shares(graded)
    return groups, {"rollout_s": time.perf_counter() - start - reward_s, "reward_s": reward_s}


def collect_groups(session: Session, step: int) -> tuple[list[Group], list[Group], dict[str, float]]:
    """A step's graded groups -> (the batch, all that were sampled, seconds).

    With rl.dynamic_sampling (DAPO), groups without signal are replaced by fresh problems in further rounds; what is still missing
    after the last round, or once the task has no more problems, stays a group without signal. Beside the seconds stands what this
    process's verifiers did.
    """
    rl = session.config.rl
    batch: list[Group] = []
    spare: list[Group] = []
    everything: list[Group] = []
    timings = {"rollout_s": 0.0, "reward_s": 0.0}
    session.grader.service.take_metrics()  # an evaluation's are not this step's
    for round_number in range(1 + rl.dynamic_sampling):
        missing = rl.prompts_per_step - len(batch)
        if not missing:
            break
        used = {group.problem.problem_id for group in everything}
        try:
            problems = session.draw_problems(step, missing, round_number, used)
        except ValueError as error:
            if round_number == 0 or not str(error).startswith("too few problems"):
                raise
            break
        groups, seconds = sample_and_grade(
            session, problems, rl.group_size, session.sampling, step, rl.routing_replay and session.model.config.num_experts > 1)
        everything += groups
        timings = {key: timings[key] + seconds[key] for key in timings}
        for group in groups:
            (batch if has_signal(group) or not rl.dynamic_sampling else spare).append(group)
    verifiers = {f"verifier/{name}": value for name, value in session.grader.service.take_metrics().items()}
    return batch + spare[: rl.prompts_per_step - len(batch)], everything, timings | verifiers


def evaluate(
    session: Session, step: int, num_problems: int, num_samples: int, with_pass_at_k: bool = False
) -> tuple[dict[str, object], float]:
    """The policy on the first `num_problems` held-out problems -> (metrics, seconds)."""
    start = time.perf_counter()
    config = session.config
    sampling = replace(session.sampling, temperature=config.eval.temperature, top_k=0, top_p=1.0, min_p=0.0)
    problems = heldout_problems(config, session.tokenizer, num_problems)
    groups, _ = sample_and_grade(session, problems, num_samples, sampling, EVAL_KEY + step)
    metrics: dict[str, object] = {"split": "heldout", **eval_metrics(groups, session.tokenizer)}
    if with_pass_at_k and config.eval.pass_at_k:
        # Noise keys differ by step alone, so this evaluation takes a step of its own.
        extra, _ = sample_and_grade(session, problems[: config.eval.problems], config.eval.pass_at_k, sampling, 2 * EVAL_KEY + step)
        metrics["pass_at_k"] = pass_at_powers(extra)
    return metrics, time.perf_counter() - start
