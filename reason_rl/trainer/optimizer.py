"""The optimizer of a stage: AdamW, or torch's Muon on the hidden matrices and AdamW on the rest.

Warm-up and schedule scale all learning rates by one factor. Master weights and optimizer states are float32.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from reason_rl.config import OptimConfig
from reason_rl.parallel.fsdp import full_tensor
from reason_rl.records import ConfigError


def lr_factor(config: OptimConfig, step: int, num_steps: int) -> float:
    """Share of the peak learning rate at update `step` of `num_steps`, both counted from 0."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    progress = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    shape = 1 - progress if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.final_lr_share + (1 - config.final_lr_share) * shape


def is_hidden_matrix(name: str, parameter: torch.Tensor) -> bool:
    """Muon's parameters: matrices of attention, MLPs and experts, not embedding, head or router."""
    return parameter.dim() >= 2 and not name.startswith(("embedding", "head")) and not name.endswith("router")


class MatrixMuon:
    """torch.optim.Muon for stacked matrices ([E, out, in] is E matrices) and for sharded ones.

    torch's Muon accepts only 2-D parameters, so it gets 2-D views of a stack, which share its memory. Muon
    orthogonalises whole matrices, so under FSDP each rank keeps an unsharded copy of them and does the same
    update. For these matrices sharding then saves no memory; adamw has no such copies.
    """

    def __init__(self, parameters: list[nn.Parameter], config: OptimConfig) -> None:
        self.parameters = parameters
        self.whole = [full_tensor(p.detach()) for p in parameters]
        self.matrices = [[nn.Parameter(m) for m in (w.unbind(0) if w.dim() == 3 else [w])] for w in self.whole]
        flat = [m for matrices in self.matrices for m in matrices]
        self.inner = torch.optim.Muon(flat, lr=config.muon_lr, weight_decay=config.weight_decay, momentum=0.95)

    @torch.no_grad()
    def step(self) -> None:
        # Unsharded gradients for the 2-D views.
        for parameter, matrices in zip(self.parameters, self.matrices, strict=True):
            if parameter.grad is None:
                continue
            gradient = full_tensor(parameter.grad)
            for matrix, grad in zip(matrices, gradient.unbind(0) if gradient.dim() == 3 else [gradient], strict=True):
                matrix.grad = grad

        # One update, then back into the shards.
        self.inner.step()
        self.inner.zero_grad()  # a parameter without a gradient in the next step must not reuse this one
        for parameter, whole in zip(self.parameters, self.whole, strict=True):
            if isinstance(parameter, DTensor):
                parameter.to_local().copy_(_reshard(whole, parameter).to_local())

    def reload(self) -> None:
        """Refreshes the unsharded copies after a checkpoint set the parameters."""
        for parameter, whole in zip(self.parameters, self.whole, strict=True):
            whole.copy_(full_tensor(parameter.detach()))


def _reshard(whole: torch.Tensor, like: DTensor) -> DTensor:
    # Every rank has the same unsharded tensor, so each slices its shard without communication.
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


class Optimizer:
    """`step` clips, updates and clears gradients; `state_dict` has unsharded tensors on the CPU."""

    def __init__(self, model: nn.Module, config: OptimConfig) -> None:
        # Trainable parameters in three sets: Muon's, AdamW's with weight decay, AdamW's without.
        self.config = config
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.parameters = [p for _, p in named]
        hidden = [p for name, p in named if config.name == "muon" and is_hidden_matrix(name, p)]
        taken = {id(p) for p in hidden}
        decayed = [p for name, p in named if id(p) not in taken and p.dim() >= 2 and not name.startswith("embedding")]
        taken |= {id(p) for p in decayed}
        plain = [p for p in self.parameters if id(p) not in taken]

        # AdamW; fused unless parameters are sharded.
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps,
            fused=all(not isinstance(p, DTensor) for p in self.parameters))
        self.muon = MatrixMuon(hidden, config) if hidden else None

    def step(self, factor: float) -> float:
        """One update at `factor` of the peak learning rates -> the gradient's norm before clipping."""
        # Clip; a gradient that is not finite ends the run.
        limit = self.config.clip_norm or math.inf
        norm = float(full_tensor(nn.utils.clip_grad_norm_(self.parameters, limit)))
        if not math.isfinite(norm):
            raise FloatingPointError(f"the gradient's norm is {norm}: the update would destroy the weights; "
                                     "lower the learning rate, or check the loss in metrics.jsonl")

        # Update and clear.
        for group in self.adamw.param_groups:
            group["lr"] = self.config.lr * factor
        self.adamw.step()
        if self.muon is not None:
            for group in self.muon.inner.param_groups:
                group["lr"] = self.config.muon_lr * factor
            self.muon.step()
        for parameter in self.parameters:
            parameter.grad = None
        return norm

    def _inner(self) -> list[torch.optim.Optimizer]:
        return [self.adamw] + ([self.muon.inner] if self.muon is not None else [])

    def state_dict(self) -> list[dict[int, dict[str, Any]]]:
        """Per inner optimizer: parameter index -> its state, unsharded, on the CPU (a collective if
        sharded)."""
        states = []
        for inner in self._inner():
            parameters = [p for group in inner.param_groups for p in group["params"]]
            states.append({
                number: {key: full_tensor(value).detach().cpu().clone() if isinstance(value, torch.Tensor) else value
                         for key, value in inner.state.get(parameter, {}).items()}
                for number, parameter in enumerate(parameters)
            })
        return states

    def load_state_dict(self, states: list[dict[int, dict[str, Any]]]) -> None:
        if len(states) != len(self._inner()):
            raise ConfigError(f"the checkpoint holds the state of {len(states)} optimizers, this run has {len(self._inner())}")
        for inner, state in zip(self._inner(), states, strict=True):
            parameters = [p for group in inner.param_groups for p in group["params"]]
            if len(state) != len(parameters):
                raise ConfigError(f"the checkpoint holds optimizer state of {len(state)} parameters, this run has "
                                  f"{len(parameters)}")
            for number, parameter in enumerate(parameters):
                inner.state[parameter] = {key: _place(value, parameter) for key, value in state[number].items()}
        if self.muon is not None:
            self.muon.reload()


def _place(value: Any, parameter: torch.Tensor) -> Any:
    if not isinstance(value, torch.Tensor) or value.dim() == 0:
        return value.to(parameter.device) if isinstance(value, torch.Tensor) and parameter.is_cuda else value
    if isinstance(parameter, DTensor):
        return _reshard(value.to(parameter.device), parameter)
    return value.to(parameter.device)
