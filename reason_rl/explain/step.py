"""One real GRPO step of a checkpoint, recorded: the stage's own `step`, with observers on its engine and its updates.

The config is that of the run whose folder contains the checkpoint, or of --config. Nothing is written to the run. The optimizer
starts without state, as at the first step of a stage. Left out: several processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from kernels.grpo_loss import LossInputs
from reason_rl.config import Config, ConfigError, config_of_stage, load_config
from reason_rl.data import Tokenizer, load_problems
from reason_rl.engine.scheduler import Scheduler
from reason_rl.eval.plan import config_of_run
from reason_rl.model.hf_config import read_model_config
from reason_rl.model.scoring import token_logprobs
from reason_rl.parallel.world import init_world
from reason_rl.records import Microbatch, Problem, StepStats
from reason_rl.rl.advantages import compute_advantages
from reason_rl.rl.packing import Sample, select_samples
from reason_rl.stages.base import StageStart
from reason_rl.stages.grpo import Grpo
from reason_rl.trainer.update import OnLoss


@dataclass(frozen=True)
class BlockMoment:
    """The KV blocks at one moment of sampling. Two running completions, 1.1 and 1.2, of one prompt:

        BlockMoment(num_free=5, num_waiting=0, prompts=[(problem, (1, 2), 2)],
                    sequences=[(problem, 0, (3,), 4), (problem, 1, (4,), 4)])
    """

    num_free: int
    num_waiting: int
    prompts: list[tuple[Problem, tuple[int, ...], int]]
    """(problem, blocks, ref_count)"""
    sequences: list[tuple[Problem, int, tuple[int, ...], int]]
    """(problem, sample_index, blocks, tokens sampled so far)"""


@dataclass
class RecordedMicrobatch:
    microbatch: Microbatch
    inputs: LossInputs
    logprobs: torch.Tensor
    """f32[N], the trainer's, before the update."""
    loss: float
    """The kernel's: this microbatch's part of the update's loss."""
    entropy: torch.Tensor | None
    """f32[N], if the loss has an entropy bonus."""
    samples: list[Sample] = field(default_factory=list)
    """By sequence_index."""
    new_logprobs: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    """f32[N], after the step's last update."""


@dataclass
class RecordedUpdate:
    microbatches: list[RecordedMicrobatch]
    metrics: dict[str, float]
    lr: float
    weight_norm: float
    """Of all weights before the update."""
    change_norm: float
    """Of their change."""
    changes: list[tuple[str, float]]
    """(parameter, norm of its change over its own norm), largest first."""


class RecordedGrpo(Grpo):
    """The stage, with a record of the block pool and of every update."""

    def __init__(self, start: StageStart) -> None:
        super().__init__(start)
        self.moments: list[BlockMoment] = []
        self.updates: list[RecordedUpdate] = []
        self.engine.on_step = self.record_blocks

    def record_blocks(self, scheduler: Scheduler) -> None:
        pool, running = scheduler.pool, scheduler.running
        prompts = {id(one.prompt): one.prompt for one in running}.values()
        self.moments.append(BlockMoment(
            pool.num_free, len(scheduler.waiting),
            [(prompt.problem, tuple(prompt.blocks), pool.ref_count(prompt.blocks[0])) for prompt in prompts],
            [(one.prompt.problem, one.sample_index, tuple(one.blocks), len(one.token_ids)) for one in running]))

    def update(
        self, microbatches: Sequence[Microbatch], index: int, max_gap: float, on_loss: OnLoss | None = None
    ) -> dict[str, float]:
        """The stage's update, with a record of its microbatches and of how it changed the weights."""
        recorded: list[RecordedMicrobatch] = []

        def record(microbatch: Microbatch, inputs: LossInputs, logprobs: torch.Tensor, loss: float) -> None:
            entropy = self.token_logprobs(microbatch)[1] if self.loss.entropy_coef else None
            recorded.append(RecordedMicrobatch(microbatch, inputs, logprobs, loss, entropy))

        # Update, with a copy of the weights to compare with.
        parameters = dict(self.policy.model.named_parameters())
        before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        metrics = super().update(microbatches, index, max_gap, record)

        # How far each parameter moved.
        changes = {name: float((parameters[name].detach() - old).norm()) for name, old in before.items()}
        norms = {name: float(old.norm()) for name, old in before.items()}
        shares = sorted(((name, changes[name] / norms[name]) for name in norms if norms[name]), key=lambda pair: -pair[1])
        lr = self.config.optim.lr * self.policy.lr_factor(index)
        self.updates.append(RecordedUpdate(recorded, metrics, lr, total(norms.values()), total(changes.values()), shares))
        return metrics

    @torch.no_grad()
    def token_logprobs(self, microbatch: Microbatch) -> tuple[torch.Tensor, torch.Tensor]:
        """(logprobs f32[N], entropy f32[N]) with the policy's weights at this moment."""
        return token_logprobs(self.policy.model, microbatch, self.sampling.temperature)[:2]

    def finish(self, stats: StepStats) -> None:
        """Adds to each microbatch its completions, in the order in which they were packed, and its logprobs after the step."""
        mask = compute_advantages(stats.groups, self.config.rl, torch.device("cpu")).mask
        samples = iter(select_samples(stats.groups, mask))
        for one in (one for update in self.updates for one in update.microbatches):
            one.samples = [next(samples) for _ in range(one.microbatch.num_sequences)]
            one.new_logprobs = self.token_logprobs(one.microbatch)[0]
        assert next(samples, None) is None, "a completion of the step was packed nowhere"


def total(norms: Iterable[float]) -> float:
    """The norm of a vector whose parts have these norms."""
    return float(torch.tensor(list(norms), dtype=torch.float64).norm())


@dataclass(frozen=True)
class Explanation:
    """All that the page shows."""

    checkpoint: Path
    stage: RecordedGrpo
    """After its step."""
    stats: StepStats


def resolve_config(checkpoint: Path, path: str | Path | None, overrides: Sequence[str]) -> Config:
    """The config of the run's GRPO stage: the one that the checkpoint is named after, else the last."""
    path = path or config_of_run(checkpoint)
    if path is None and not any(override.startswith("--task.name=") for override in overrides):
        raise ConfigError(f"{checkpoint} is not in a run's folder: choose the problems by --config FILE or --task.name=NAME")
    config = load_config(path, [*overrides, f"--model.init_from={checkpoint}"])
    stages = [stage for stage in config.stages if stage.kind == Grpo.kind]
    if config.stages and not stages:
        raise ConfigError(f"{path} has no grpo stage, only {', '.join(stage.kind for stage in config.stages)}")
    if stages:
        config = config_of_stage(config, {stage.name: stage for stage in stages}.get(checkpoint.resolve().name, stages[-1]))
    model, vocab_size = read_model_config(checkpoint)
    tokenizer_size = Tokenizer.load(checkpoint).vocab_size
    if tokenizer_size > vocab_size:
        raise ConfigError(f"{checkpoint}: its tokenizer has {tokenizer_size} tokens, its model only {vocab_size}")
    return replace(config, model=replace(model, init_from=str(checkpoint)))


def prepare(checkpoint: Path, path: str | None, overrides: Sequence[str]) -> RecordedGrpo:
    """Raises ValueError or OSError for whatever can fail before the step."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ConfigError("an explanation runs in one process, not under torchrun")
    config = resolve_config(checkpoint, path, overrides)
    tokenizer = Tokenizer.load(checkpoint)
    problems = load_problems(config, tokenizer)
    few = replace(config.eval, problems=1, final_problems=1)  # no evaluation follows, so one held-out problem is enough to check
    Grpo.check(replace(config, eval=few), tokenizer, problems)
    return RecordedGrpo(StageStart(config, init_world(config.run), tokenizer, problems, offset=0,
                                   folder=checkpoint, checkpoint=None))


def explain(checkpoint: Path, stage: RecordedGrpo) -> Explanation:
    """Makes the stage's first step."""
    try:
        stats = stage.step(0)
        stage.finish(stats)
    finally:
        stage.close()
    return Explanation(checkpoint, stage, stats)
