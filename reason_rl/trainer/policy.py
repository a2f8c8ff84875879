"""The policy that a stage trains: the sharded model, its optimizer, and the weights that the engine samples with.

`version` counts optimizer updates; every completion carries the version that sampled it.
"""

from __future__ import annotations

from reason_rl.config import OptimConfig
from reason_rl.model.transformer import Transformer
from reason_rl.parallel.fsdp import SamplingWeights, shard
from reason_rl.parallel.world import World
from reason_rl.trainer.optimizer import Optimizer, lr_factor


class Policy:
    """From a plain model on the CPU, which moves to the run's device and is sharded in place."""

    def __init__(self, model: Transformer, optim: OptimConfig, num_steps: int, world: World, is_exact: bool = True) -> None:
        model.compute_dtype = world.dtype
        model.set_batch_invariant(is_exact).to(world.device)
        self.model, self.world = shard(model, world), world
        self.optim, self.num_steps = optim, num_steps
        self.optimizer = Optimizer(self.model, optim)
        self.version = 0
        self.num_steps_done = 0
        """Steps of the stage that an earlier session made."""
        self._sampling: SamplingWeights | None = None

    def lr_factor(self, index: int) -> float:
        """Share of the peak learning rate at step `index` of the stage."""
        return lr_factor(self.optim, index, self.num_steps)

    @property
    def sampling_model(self) -> Transformer:
        """The policy as a plain module that the engine can read; `updated` keeps it current."""
        if self._sampling is None:
            self._sampling = SamplingWeights(self.model, self.world)
        return self._sampling.model

    def updated(self) -> None:
        """After an optimizer update: the engine samples with the new weights."""
        self.version += 1
        if self._sampling is not None:
            self._sampling.refresh()


def frozen_copy(model: Transformer, world: World, is_exact: bool = True) -> Transformer:
    """The reference policy of a KL penalty: a plain copy of `model` that no update changes."""
    copy = Transformer(model.config, model.vocab_size, world.dtype)
    copy.load_state_dict(model.state_dict())
    return copy.set_batch_invariant(is_exact).to(world.device).requires_grad_(False)
