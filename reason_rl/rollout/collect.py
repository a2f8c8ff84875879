"""Sample and grade: problems in, graded groups out. Training and evaluation share this one path.

`collect` covers two stages of a GRPO step. The engine samples; each completion goes to the verifiers as soon as it ends, so that
grading overlaps the sampling of the others. `refill` adds DAPO's dynamic sampling.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace

import torch

from kernels.grpo_loss.spec import LossSpec
from reason_rl.config import Config
from reason_rl.data import (
    Tokenizer,
    TooFewProblems,
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
from reason_rl.report.clock import Clock
from reason_rl.reward import Grader, Pending, check_rewards
from reason_rl.rl.advantages import has_signal
from reason_rl.rollout.metrics import eval_metrics, pass_at_powers
from reason_rl.trainer.optimizer import Optimizer

EVAL_KEY = 1 << 40
"""Offset of `step` in evaluations, so that their noise differs from that of rollouts. A run adds it once (pass@k: twice),
`python -m reason_rl.eval` three times."""


@dataclass
class _Grading:
    """The completions of one `collect` that wait for their verdicts, and the groups that are graded."""

    grader: Grader
    group_size: int
    on_group: Callable[[Group], None] | None
    on_completion: Callable[[Problem, Completion], None] | None
    pending: dict[int, dict[int, tuple[Completion, Pending]]] = field(default_factory=dict)
    """By id(problem), then by sample_index. problem_id would not do: a batch may contain a problem twice."""
    sampled: deque[Problem] = field(default_factory=deque)
    """Problems whose group is fully sampled but not yet graded, in the order in which sampling finished."""
    graded: dict[int, Group] = field(default_factory=dict)
    """By id(problem)."""

    def add(self, problem: Problem, completion: Completion) -> None:
        """Sends a completion to the verifiers, then passes on the groups that are graded by now."""
        samples = self.pending.setdefault(id(problem), {})
        samples[completion.sample_index] = completion, self.grader.submit(problem, completion)
        if len(samples) == self.group_size:
            self.sampled.append(problem)
        if self.on_completion is not None:
            self.on_completion(problem, completion)
        while self.sampled and all(one.is_done for _, one in self.pending[id(self.sampled[0])].values()):
            self._grade_next()

    def finish(self) -> None:
        """Waits for the verdicts of every group that is fully sampled."""
        while self.sampled:
            self._grade_next()

    def _grade_next(self) -> None:
        problem = self.sampled.popleft()
        samples = self.pending[id(problem)]
        completions, pending = zip(*(samples[index] for index in range(self.group_size)), strict=True)
        group = self.graded[id(problem)] = Group(problem, completions, tuple(one.score() for one in pending))
        if self.on_group is not None:
            self.on_group(group)


def collect(
    engine: Engine, grader: Grader, problems: Sequence[Problem], group_size: int, sampling: SamplingParams, *,
    world: World, step: int, policy_version: int = 0, with_routed_experts: bool = False,
    on_group: Callable[[Group], None] | None = None, on_completion: Callable[[Problem, Completion], None] | None = None,
    clock: Clock | None = None,
) -> list[Group]:
    """`group_size` graded completions of each problem; every rank gets all groups, in the problems' order.

    Each rank samples and grades its share of the problems. `step` is part of the noise key.
    on_completion: called on this rank as each completion ends.
    on_group: called on this rank as soon as a group is graded, in the order in which groups finish sampling; the group lacks
        the routed experts of its prompt. If sampling is interrupted, fully sampled groups are still graded and passed on.
    clock: "reward" counts the wait for verdicts after the last completion, "rollout" the rest.
    """
    clock = clock or Clock()
    grading = _Grading(grader, group_size, on_group, on_completion)

    # Sample. Without on_group, an interrupted call has no use for its groups, so it does not wait for their verdicts.
    try:
        with clock("rollout"):
            sampled = engine.generate(
                world.share(problems), group_size, sampling, step=step, policy_version=policy_version, on_finish=grading.add,
                with_routes=with_routed_experts)
    except BaseException:
        if on_group is not None:
            grading.finish()
        raise

    # Wait for the last verdicts, then exchange groups between the ranks.
    with clock("reward"):
        grading.finish()
    graded = [group.with_scores(grading.graded[id(group.problem)].scores) for group in sampled]
    with clock("rollout"):
        return world.gather_shares(graded)


def refill(
    sampled: list[Group], max_rounds: int, *, draw: Callable[[int, int, Collection[int]], list[Problem]],
    sample: Callable[[Sequence[Problem]], list[Group]],
) -> list[Group]:
    """DAPO's dynamic sampling (arXiv:2503.14476, section 3.2): replaces groups without signal by groups of fresh problems.

    Returns a batch as large as `sampled` was, and appends every new group to `sampled`. Each round draws one problem for every
    place that is still open. After the last round, or once the task has no more problems, groups without signal fill the places.
    draw: (count, round from 1, ids of all problems so far) -> problems. sample: `collect` with its other arguments bound.
    """
    num_groups, new = len(sampled), sampled
    batch: list[Group] = []
    without_signal: list[Group] = []
    for round_number in range(1, 2 + max_rounds):
        # Keep the groups of the latest round that have signal.
        for group in new:
            (batch if has_signal(group) else without_signal).append(group)
        missing = num_groups - len(batch)
        if not missing or round_number > max_rounds:
            break

        # Draw and sample a problem for each of the others.
        try:
            problems = draw(missing, round_number, {group.problem.problem_id for group in sampled})
        except TooFewProblems:
            break
        new = sample(problems)
        sampled += new
    return batch + without_signal[: num_groups - len(batch)]


CHECKED_DOCUMENTS = 512
"""Documents of the corpus that are drawn before any work, to see that they fit."""


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
    draw_problems: Callable[[int, int, int, Collection[int]], list[Problem]]
    """(step, count, round, excluded problem ids) -> `count` problems, the same on every rank."""
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
    model.use_gemm("torch" if config.run.exact == "off" else "auto")
    if config.loss.kl_coef > 0:
        reference = Transformer(model.config, model.vocab_size, world.dtype)
        reference.load_state_dict(reference_state or model.state_dict())
        reference.use_gemm(model.gemm).to(world.device).requires_grad_(False)
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


def collect_groups(session: Session, step: int) -> tuple[list[Group], list[Group], Clock]:
    """A step's graded groups -> (the batch, all that were sampled, their seconds)."""
    rl, clock = session.config.rl, Clock()
    session.grader.service.take_metrics()  # an evaluation's are not this step's

    def sample(problems: Sequence[Problem]) -> list[Group]:
        return collect(
            session.engine, session.grader, problems, rl.group_size, session.sampling, world=session.world, step=step,
            policy_version=session.policy_version, clock=clock,
            with_routed_experts=rl.routing_replay and session.model.config.num_experts > 1)

    sampled = sample(session.draw_problems(step, rl.prompts_per_step, 0, ()))
    batch = sampled
    if rl.dynamic_sampling:
        batch = refill(sampled, rl.dynamic_sampling, sample=sample,
                       draw=lambda count, round, exclude: session.draw_problems(step, count, round, exclude))
    return batch, sampled, clock


def evaluate(
    session: Session, step: int, num_problems: int, num_samples: int, with_pass_at_k: bool = False
) -> tuple[dict[str, object], float]:
    """The policy on the first `num_problems` held-out problems -> (metrics, seconds)."""
    start = time.perf_counter()
    config = session.config
    sampling = replace(session.sampling, temperature=config.eval.temperature, top_k=0, top_p=1.0, min_p=0.0)
    problems = heldout_problems(config, session.tokenizer, num_problems)
    groups = collect(session.engine, session.grader, problems, num_samples, sampling, world=session.world, step=EVAL_KEY + step,
                     policy_version=session.policy_version)
    metrics: dict[str, object] = {"split": "heldout", **eval_metrics(groups, session.tokenizer)}
    if with_pass_at_k and config.eval.pass_at_k:
        # Noise keys differ by step alone, so this evaluation takes a step of its own.
        extra = collect(session.engine, session.grader, problems[: config.eval.problems], config.eval.pass_at_k, sampling,
                        world=session.world, step=2 * EVAL_KEY + step, policy_version=session.policy_version)
        metrics["pass_at_k"] = pass_at_powers(extra)
    return metrics, time.perf_counter() - start
