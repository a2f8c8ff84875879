"""Sharding with FSDP2, and the unsharded copies that the engine and a checkpoint need."""

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
    """Shards in place for several processes: each block is an FSDP unit, the rest another. One process keeps the plain module."""
    if world.size > 1:
        # The mesh names the run's device: fully_shard's default is the machine's GPU even when the run is on the CPU.
        mesh = init_device_mesh(world.device.type, (world.size,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        # The root keeps its parameters after forward: the LM head is used outside of it.
        fully_shard(model, mesh=mesh, reshard_after_forward=False)
    return model


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor, gathered whole on every rank (a collective); a plain tensor as it is."""
    if isinstance(tensor, DTensor):
        whole: torch.Tensor = tensor.full_tensor()
        return whole
    return tensor


def full_state(model: Transformer) -> dict[str, torch.Tensor]:
    """Parameters and expert biases by name, whole and detached (a collective)."""
    return {name: full_tensor(tensor).detach() for name, tensor in model.state_dict().items()}


class SamplingWeights:
    """The policy's weights as the engine reads them.

    One process shares the trainer's module in float32, and on the CPU also in bf16. Otherwise the engine reads a plain copy whose
    matrices are rounded once, where the trainer's forward rounds them at each use (the router is not rounded), so both compute with
    the same bits. `refresh` copies the weights after an update.
    """

    def __init__(self, model: Transformer, world: World) -> None:
        self._trained, self._world = model, world
        # On a GPU the time of a decode step is the time to read the weights: f32 masters would double it, and cast at every token.
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
    """This rank's microbatches, filled up with idle ones to the same number on every rank: a sharded forward is a collective."""
    rounds = -(-len(microbatches) // world.size)
    mine = world.share(microbatches)
    return mine + [idle] * (rounds - len(mine))
