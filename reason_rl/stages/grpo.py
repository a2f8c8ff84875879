"""Reinforcement learning with verifiable rewards (GRPO, arXiv:2402.03300, and its variants).

`step` is the algorithm: problems -> rollouts and rewards -> advantages -> packed microbatches -> updates. The
variants DAPO, Dr. GRPO, GSPO, CISPO and RLOO are keys of [rl] and [loss]; configs/algorithms has a preset for
each.

Left out: a value model (the group's rewards are the baseline), and sampling ahead of the update (rollouts
always come from the current weights).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from reason_rl.config import Config
from reason_rl.data import Problems, Tokenizer
from reason_rl.engine import Engine, check_fits
from reason_rl.records import Group, Microbatch, Problem, SamplingParams, StepStats
from reason_rl.report.clock import Clock
from reason_rl.reward import Grader, check_rewards
from reason_rl.rl.advantages import compute_advantages
from reason_rl.rl.packing import pack
from reason_rl.rollout.collect import collect, refill
from reason_rl.rollout.metrics import step_stats, step_warnings
from reason_rl.stages.base import Metrics, StageStart
from reason_rl.stages.heldout import evaluate_heldout
from reason_rl.trainer.policy import frozen_copy
from reason_rl.trainer.update import OnLoss, fill_logprobs, policy_update

NOTABLE_GAP = 1e-3
"""Largest gap, in nats on policy, that gives no warning where exactness is not expected."""


class Grpo:
    # Read by the loop and the recipe; stages/base.py explains each.
    kind: ClassVar[str] = "grpo"
    sections: ClassVar[tuple[str, ...]] = ("task", "rl", "loss", "optim", "sampling", "reward", "eval")
    code: ClassVar[tuple[str, ...]] = (
        "model", "data", "answers", "sandbox", "reward", "engine", "rl", "rollout", "trainer", "stages", "kernels", "csrc")
    starts_from_weights: ClassVar[bool] = True
    uses_problems: ClassVar[bool] = True
    log_every: ClassVar[int] = 1

    def __init__(self, start: StageStart) -> None:
        # Settings that depend on the tokenizer or on another section.
        config = start.config
        assert start.problems is not None
        self.config, self.world, self.tokenizer, self.problems = config, start.world, start.tokenizer, start.problems
        self.num_steps, self.checkpoint_every = self.num_steps_of(config), config.run.checkpoint_every
        self.offset = start.offset
        self.sampling = replace(config.sampling, stop_ids=start.tokenizer.stop_ids)
        self.loss = replace(config.loss, constant_length=config.loss.constant_length or config.sampling.max_tokens)

        # The policy, the reference policy if there is a KL penalty, the engine and the grader.
        model = start.load()
        self.reference = frozen_copy(model, start.world, start.is_exact) if config.loss.kl_coef > 0 else None
        self.policy = start.policy(model, config.optim, self.num_steps)
        self.engine = Engine(self.policy.sampling_model, config.engine, config.run.seed)
        self.grader = Grader(config, start.tokenizer)  # its worker processes start at the first completion

    def step(self, index: int) -> StepStats:
        """Samples and grades a group of completions per problem, compares them, and updates the policy."""
        rl, clock, updates = self.config.rl, Clock(), []
        with clock("step"):
            # Problems -> rollouts and rewards: a completion is graded when it ends, while others are sampled.
            problems = self.problems.train(self.offset + index, rl.prompts_per_step)  # the same on every rank
            sampled = self.collect(problems, rl.group_size, self.sampling, self.offset + index, clock, rl.routing_replay)
            groups = self.refill(sampled, self.offset + index, clock) if rl.dynamic_sampling else sampled

            # Rewards -> advantages f32[B, G]: reward relative to the other completions of the group.
            advantages = compute_advantages(groups, rl, self.world.device)

            with clock("train"):
                # Packing: each group's prompt once, then its completions; a list of microbatches per update.
                minibatches = pack(groups, advantages, rl.num_minibatches, self.config.optim.microbatch_tokens)
                minibatches = [self.with_logprobs(microbatches) for microbatches in minibatches]

                # Update: forward, loss, backward, clip, optimizer step. Only the first one is on policy.
                for number, microbatches in enumerate(minibatches):
                    updates.append(self.update(microbatches, index, max_gap=math.inf if number else self.max_gap))
        stats = step_stats(index, groups, sampled, advantages, minibatches, updates, self.tokenizer, clock,
                           lr=self.policy.lr_factor(index) * self.config.optim.lr, verifiers=self.grader.service.take_metrics())
        return replace(stats, warnings=step_warnings(stats, self.expected_gap))

    def collect(self, problems: Sequence[Problem], group_size: int, sampling: SamplingParams, key: int, clock: Clock,
                with_routed_experts: bool = False) -> list[Group]:
        """Samples groups with the current weights and grades them. `key`: the step, for the noise key."""
        return collect(self.engine, self.grader, problems, group_size, sampling, world=self.world, step=key, clock=clock,
                       policy_version=self.policy.version,
                       with_routed_experts=with_routed_experts and self.policy.model.config.num_experts > 1)

    def refill(self, sampled: list[Group], key: int, clock: Clock) -> list[Group]:
        """DAPO's dynamic sampling: replaces groups without signal by groups of fresh problems, and appends
        these to `sampled`."""
        rl = self.config.rl
        return refill(
            sampled, rl.dynamic_sampling, draw=lambda count, round, exclude: self.problems.train(key, count, round, exclude),
            sample=lambda problems: self.collect(problems, rl.group_size, self.sampling, key, clock, rl.routing_replay))

    def with_logprobs(self, microbatches: Sequence[Microbatch]) -> list[Microbatch]:
        """Adds the logprobs that the loss compares with, if the config asks for them: old_logprobs, of the policy
        before the step's first update, and ref_logprobs, of the frozen reference policy."""
        temperature, filled = self.sampling.temperature, list(microbatches)
        if self.config.rl.old_logprobs == "recompute":
            # Each rank fills its own microbatches, so by the plain copy: a sharded forward would wait for all ranks.
            filled = fill_logprobs(self.policy.sampling_model, filled, self.world, temperature=temperature, name="old_logprobs")
        if self.reference is not None:
            filled = fill_logprobs(self.reference, filled, self.world, temperature=temperature, name="ref_logprobs")
        return filled

    def update(
        self, microbatches: Sequence[Microbatch], index: int, max_gap: float, on_loss: OnLoss | None = None
    ) -> dict[str, float]:
        """One optimizer update of step `index` -> the loss's metrics."""
        return policy_update(
            self.policy, microbatches, self.loss, self.sampling.temperature, lr_factor=self.policy.lr_factor(index),
            max_gap=max_gap, on_loss=on_loss)

    def evaluate(self, num_done: int) -> Metrics | None:
        metrics = evaluate_heldout(
            self.config.eval, self.problems, self.sampling, self.tokenizer, self.collect, num_done, self.num_steps,
            self.offset)
        self.grader.service.take_metrics()  # discarded: they must not enter the next step's metrics
        return metrics

    @property
    def max_gap(self) -> float:
        """Largest allowed gap between engine and trainer logprobs on policy, in nats."""
        return 0.0 if self.config.run.exact == "on" else self.config.rl.max_logprob_gap or math.inf

    @property
    def expected_gap(self) -> float:
        """A larger gap is worth a warning: exact ops give 0, others round differently in another batch."""
        return 0.0 if self.world.device.type == "cpu" and self.config.run.exact != "off" else NOTABLE_GAP

    def close(self) -> None:
        self.grader.close()

    @staticmethod
    def num_steps_of(config: Config) -> int:
        return config.rl.steps

    @staticmethod
    def check(config: Config, tokenizer: Tokenizer, problems: Problems | None) -> list[str]:
        """Raises if problems are too few, a prompt does not fit, or a reward or the sandbox is missing."""
        assert problems is not None
        settings = config.eval
        known = problems.to_check(config.rl.prompts_per_step, max(settings.final_problems, settings.problems))
        problems.check(known, config)
        check_fits(known, config.sampling.max_tokens, config.model.max_position_embeddings, config.engine.num_blocks)
        return [*problems.describe(), *check_rewards(config, known[0])]
