"""What a stage is. `run/loop.py` drives any list of them: it logs, saves, resumes, stops and reports; a stage only learns.

A new kind of stage is a class with these members in a file of this room, and a line in `STAGES` (stages/__init__.py).
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
"""Names and numbers; they follow from config and seed alone."""


@dataclass(frozen=True)
class StageStart:
    """What the loop hands to a stage: where it runs, its sections of the recipe, and the weights that it begins from."""

    config: Config
    world: World
    tokenizer: Tokenizer
    problems: Problems | None
    folder: Path | None
    """The checkpoint whose weights it starts from: the output of the stage before, or model.init_from; None: random weights."""
    checkpoint: Path | None
    """This stage's own newest checkpoint, where an earlier session stopped."""

    def load(self) -> Transformer:
        """The weights that the stage starts from, on the CPU."""
        assert self.folder is not None, "the loop hands weights to every stage that starts from them"
        return load_model(self.folder)

    @property
    def is_exact(self) -> bool:
        """Batch-invariant ops wherever there are any; run.exact = "off" takes torch's own GEMMs."""
        return self.config.run.exact != "off"

    def policy(self, model: Transformer, optim: OptimConfig, num_steps: int) -> Policy:
        """`model` on the run's device, sharded, with its optimizer; both as the checkpoint has them, where there is one."""
        if self.checkpoint is None:
            return Policy(model, optim, num_steps, self.world, self.is_exact)
        progress, optimizer_state = load_checkpoint(self.checkpoint, model)
        policy = Policy(model, optim, num_steps, self.world, self.is_exact)
        policy.optimizer.load_state_dict(optimizer_state)
        policy.version, policy.num_steps_done = progress.policy_version, progress.num_steps
        return policy


class Stage(Protocol):
    """`Stage(start)` makes it ready to step; `check` runs before any work of the recipe."""

    kind: ClassVar[str]
    sections: ClassVar[tuple[str, ...]]
    """The config sections that its output depends on."""
    rooms: ClassVar[tuple[str, ...]]
    """The packages whose code its output depends on: after a change there, a finished output is not reused."""
    starts_from_weights: ClassVar[bool]
    """Needs a stage before it, or model.init_from."""
    uses_problems: ClassVar[bool]
    """Samples or measures on the task's problems; a stage that does not is handed None."""
    log_every: ClassVar[int]
    """Steps between two lines of metrics.jsonl."""

    num_steps: int
    checkpoint_every: int
    """Steps between two checkpoints; 0: by time alone."""
    policy: Policy

    def __init__(self, start: StageStart) -> None: ...

    @staticmethod
    def check(config: Config, tokenizer: Tokenizer, problems: Problems | None) -> list[str]:
        """Raises for whatever can fail before work starts -> lines that the run prints."""

    def step(self, index: int) -> StepStats:
        """One optimizer step, wherever its data comes from; `index` counts from 0."""

    def evaluate(self, num_done: int) -> Metrics | None:
        """The policy after `num_done` steps, or None where no evaluation is due. Called with 0 before the first step."""

    def close(self) -> None:
        """Ends worker processes."""
