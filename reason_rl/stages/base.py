"""The interface of a stage. `run/loop.py` logs, saves, resumes, stops and reports; a stage only trains and
evaluates.

To add a kind of stage, write a class with the members of `Stage` in this folder and add it to `STAGES` in
__init__.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from reason_rl.config import Config, OptimConfig
from reason_rl.data import Problems, Tokenizer
from reason_rl.model.transformer import Transformer
from reason_rl.model.weights import load_model
from reason_rl.parallel.world import World
from reason_rl.records import StepStats
from reason_rl.trainer.checkpoint import load_checkpoint
from reason_rl.trainer.policy import Policy

Metrics = Mapping[str, Any]
"""Name -> number; a function of config and seed."""


@dataclass(frozen=True)
class StageStart:
    """A stage's argument: its config, the processes and device, and the weights that it starts from."""

    config: Config
    world: World
    tokenizer: Tokenizer
    problems: Problems | None
    offset: int
    """Steps that earlier stages of this chain took on problems: this stage's problems and noise come after theirs."""
    folder: Path | None
    """Checkpoint to start from: an earlier stage's output, or model.init_from; None: random weights."""
    checkpoint: Path | None
    """This stage's newest checkpoint, if an earlier session was interrupted."""

    def load(self) -> Transformer:
        """The weights that the stage starts from, on the CPU."""
        assert self.folder is not None, "a stage that starts from weights needs their folder"
        return load_model(self.folder)

    @property
    def is_exact(self) -> bool:
        """Batch-invariant ops; with run.exact = "off" torch's GEMMs."""
        return self.config.run.exact != "off"

    def policy(self, model: Transformer, optim: OptimConfig, num_steps: int) -> Policy:
        """`model` on the run's device, sharded, with its optimizer; loads `checkpoint` if it is set."""
        # From the start.
        if self.checkpoint is None:
            return Policy(model, optim, num_steps, self.world, self.is_exact)

        # From the checkpoint: the weights before sharding, the optimizer's state after it.
        progress, optimizer_state = load_checkpoint(self.checkpoint, model)
        policy = Policy(model, optim, num_steps, self.world, self.is_exact)
        policy.optimizer.load_state_dict(optimizer_state)
        policy.version, policy.num_steps_done = progress.policy_version, progress.num_steps
        return policy


class Stage(Protocol):
    """`check` runs before the first stage of a recipe; then `Stage(start)`, and `step` until `num_steps`."""

    kind: ClassVar[str]
    sections: ClassVar[tuple[str, ...]]
    """The config sections that the output depends on."""
    code: ClassVar[tuple[str, ...]]
    """The folders and files whose code the output depends on: after a change there, a finished output is not reused."""
    starts_from_weights: ClassVar[bool]
    """Whether it needs an earlier stage or model.init_from."""
    uses_problems: ClassVar[bool]
    """Whether it needs the task's problems; if not, StageStart.problems is None."""
    log_every: ClassVar[int]
    """Steps between lines of metrics.jsonl."""

    num_steps: int
    checkpoint_every: int
    """Steps between checkpoints; 0: only timed ones."""
    policy: Policy

    def __init__(self, start: StageStart) -> None: ...

    @staticmethod
    def num_steps_of(config: Config) -> int:
        """`num_steps` before the stage is built."""

    @staticmethod
    def check(config: Config, tokenizer: Tokenizer, problems: Problems | None) -> list[str]:
        """Raises for everything that can fail before work starts -> lines that the run prints."""

    def step(self, index: int) -> StepStats:
        """Step `index`, counted from 0."""

    def evaluate(self, num_done: int) -> Metrics | None:
        """Metrics of the policy after `num_done` steps (0: before the first); None if none is due."""

    def close(self) -> None:
        """Ends worker processes."""
