"""Sharding with FSDP2, and unsharded copies for the engine and for checkpoints."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from reason_rl.model.transformer import Transformer
from reason_rl.parallel.world import World
from reason_rl.records import Microbatch


def shard(model: Transformer, world: World) -> Transformer:
    """Shards `model` in place over all processes: each block is an FSDP unit, the rest is another."""
    if world.size > 1:
        # An explicit mesh: fully_shard would choose the machine's GPU even if the run is on the CPU.
        mesh = init_device_mesh(world.device.type, (world.size,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        # The root keeps its parameters unsharded after forward: the loss uses the LM head outside of it.
        fully_shard(model, mesh=mesh, reshard_after_forward=False)
    return model


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor gathered on every rank (a collective); a plain tensor unchanged."""
    if isinstance(tensor, DTensor):
        whole: torch.Tensor = tensor.full_tensor()
        return whole
    return tensor


def full_state(model: Transformer) -> dict[str, torch.Tensor]:
    """Parameters and expert biases by name, unsharded and detached (a collective)."""
    return {name: full_tensor(tensor).detach() for name, tensor in model.state_dict().items()}


class SamplingWeights:
    """The policy's weights for the engine.

    A single process uses the trainer's module itself in float32, and on the CPU also in bf16. Otherwise the
    engine has an unsharded copy, and `refresh` updates it after each optimizer update. The copy's matrices
    are rounded to the compute dtype once, the trainer's at each use, to the same bits; the router is rounded
    in neither.
    """

    def __init__(self, model: Transformer, world: World) -> None:
        self._trained, self._world = model, world
        # A decode step on a GPU is bound by reading the weights: f32 masters are twice the bytes, plus a cast
        # per token.
        self.shares_memory = world.size == 1 and (world.dtype == torch.float32 or world.device.type == "cpu")
        if self.shares_memory:
            self.model = model
            return
        self.model = Transformer(model.config, model.vocab_size, world.dtype).hold_in(world.dtype).to(world.device)
        self.model.set_batch_invariant(model.batch_invariant)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        if self.shares_memory:
            return
        target = self.model.state_dict()
        for name, tensor in self._trained.state_dict().items():
            target[name].copy_(full_tensor(tensor))


def rank_share(microbatches: Sequence[Microbatch], world: World, idle: Microbatch) -> list[Microbatch]:
    """This rank's microbatches, padded with idle ones: a sharded forward is a collective of all ranks."""
    rounds = -(-len(microbatches) // world.size)
    mine = world.share(microbatches)
    return mine + [idle] * (rounds - len(mine))
