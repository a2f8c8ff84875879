"""The policy network: a decoder-only transformer with mixture-of-experts layers, in one file.

    tokens -> embedding -> L x [x + attention(norm(x)); x + experts(norm(x))] -> norm -> hidden states

There is one forward, for prefill, decode and training: the caller hands in `attend`, which knows where the keys are (in
the pack, or in the paged cache), and everything else is the same code on the same rows. The LM head is not applied here:
`linear_logprob` (training) and `sample` (engine) take `model.head_weight`, so that [T, V] logits need never exist.

Numerics: parameters are float32 masters. The ops round matrices to the compute dtype where they use them and sum their gradients in
float32; norms, the router and softmaxes work in float32; the residual stream is in the compute dtype.

Left out: dropout, sliding windows, MLA. With num_experts = 1 every layer is dense; num_dense_layers makes the first ones so.
Letters: T packed tokens, D hidden size, H heads, K kv heads, C head dim, R of it turned, E experts, I expert size, V vocabulary,
L layers, M of them with experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from kernels.linear import linear
from kernels.moe import Route, expert_counts, experts, load_balance, route, z_loss
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rope import rope
from kernels.swiglu import swiglu
from reason_rl.config import ModelConfig
from reason_rl.model.rope import rope_table, rotary_dim

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(layer, q [T, H, C], k [T, K, C], v [T, K, C]) -> [T, H, C]"""

INIT_STD = 0.02


class RouterStats(NamedTuple):
    """What the MoE layers, M of the L, saw in one forward pass."""

    expert_counts: torch.Tensor
    """i64[M, E]: tokens sent to each expert."""
    balance_loss: torch.Tensor
    """f32[]: the load-balance loss, mean over layers, times the pack's tokens (so that packs add up)."""
    z_loss: torch.Tensor
    """f32[]: the router z-loss, likewise."""


class LayerStats(NamedTuple):
    """Of one MoE layer: i64[E], f32[], f32[]."""

    expert_counts: torch.Tensor
    balance_loss: torch.Tensor
    z_loss: torch.Tensor


class ModelOutput(NamedTuple):
    hidden: torch.Tensor
    """[T, D], after the last norm, in the compute dtype."""
    router: RouterStats | None


class RouteTape:
    """The experts of a forward pass's tokens: recorded MoE layer by MoE layer, or given beforehand (routing replay)."""

    def __init__(self, given: torch.Tensor | None = None) -> None:
        """given: i32[T, M, k], or None to record."""
        self.given = given
        self.taken: list[torch.Tensor] = []

    def follow(self, picked: Route, normalize: bool) -> Route:
        """The next layer's route: as picked, or the given experts with weights from this forward's own scores, for gradients."""
        if self.given is not None:
            expert_ids = self.given[:, len(self.taken)].long()
            weights = picked.scores.gather(1, expert_ids)
            if normalize:
                total = weights[:, :1]
                for choice in range(1, weights.shape[1]):  # in order of k, as `route` adds them
                    total = total + weights[:, choice : choice + 1]
                weights = weights / total.clamp(min=1e-20)
            picked = Route(expert_ids, weights, picked.scores)
        self.taken.append(picked.expert_ids)
        return picked

    def routes(self) -> torch.Tensor:
        """i32[T, M, k]"""
        return torch.stack(self.taken, dim=1).int()


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)

    def add(self, x: torch.Tensor, added: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """-> the norm of x + added, and that sum: where a GPU does both in one pass over memory."""
        return (self(x), x) if added is None else add_rms_norm(added, x, self.weight, self.eps)


class Linear(nn.Module):
    """A projection; its master weight f32[out, in] is rounded to x's dtype inside the op, a bias f32[out] is added in float32."""

    gemm = "auto"

    def __init__(self, in_size: int, out_size: int, has_bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_size, in_size))
        self.bias = nn.Parameter(torch.zeros(out_size)) if has_bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = linear(x, self.weight, impl=self.gemm)
        return y if self.bias is None else (y + self.bias).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions and optional qk-norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_attention_heads, self.num_key_value_heads, self.head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        rows = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
        # q, k and v in one matrix: one GEMM, one reduction order
        self.qkv = Linear(config.hidden_size, rows, has_bias=config.attention_bias != "none")
        self.out = Linear(config.num_attention_heads * config.head_dim, config.hidden_size, has_bias=config.attention_bias == "all")
        self.q_norm = self.k_norm = None
        if config.qk_norm != "none":
            self.q_norm, self.k_norm = (
                RMSNorm(config.head_dim * (heads if config.qk_norm == "full" else 1), config.rms_norm_eps)
                for heads in (config.num_attention_heads, config.num_key_value_heads))

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, layer: int, attend: Attend) -> torch.Tensor:
        heads = self.qkv(x).view(x.shape[0], -1, self.head_dim)  # [T, H + 2K, C]
        q, k, v = heads.split((self.num_attention_heads, self.num_key_value_heads, self.num_key_value_heads), dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = normed(q, self.q_norm), normed(k, self.k_norm)
        out = attend(layer, turned(q, cos, sin), turned(k, cos, sin), v)  # [T, H, C]
        return self.out(out.reshape(x.shape[0], -1))


def normed(heads: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
    """heads [T, H, C], each by itself, or all H * C as one row where the norm is so wide."""
    if norm.weight.shape[0] == heads.shape[2]:
        return norm(heads)  # as they lie: a reshape of one token's gives it other strides, by which a kernel is compiled
    return norm(heads.reshape(heads.shape[0], -1, norm.weight.shape[0])).view(heads.shape)


def turned(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """heads [T, H, C] by the angles [T, R/2]: their first R dimensions; the others stay."""
    rotary = 2 * cos.shape[1]
    if rotary == heads.shape[2]:
        return rope(heads, cos, sin)
    return torch.cat((rope(heads[..., :rotary], cos, sin), heads[..., rotary:]), dim=-1)


class MLP(nn.Module):
    """SwiGLU: the dense layer, and the shared experts of an MoE layer."""

    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.gate_up = Linear(hidden_size, 2 * inner_size)
        self.down = Linear(inner_size, hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(swiglu(self.gate_up(x)))


class MoE(nn.Module):
    """Routed SwiGLU experts, and the shared ones that every token goes through."""

    expert_bias: torch.Tensor
    gemm = "auto"

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.router = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.gate_up = nn.Parameter(torch.empty(config.num_experts, 2 * config.moe_intermediate_size, config.hidden_size))
        self.down = nn.Parameter(torch.empty(config.num_experts, config.hidden_size, config.moe_intermediate_size))
        shared = config.num_shared_experts * config.moe_intermediate_size
        self.shared = MLP(config.hidden_size, shared) if shared else None
        # Not a parameter: it is nudged against the load after a step, and no gradient flows into it.
        self.register_buffer("expert_bias", torch.zeros(config.num_experts))

    def forward(
        self, x: torch.Tensor, with_stats: bool, tape: RouteTape | None
    ) -> tuple[torch.Tensor, LayerStats | None]:
        config = self.config
        logits = linear(x.to(self.router.dtype), self.router, impl=self.gemm)
        picked = route(
            logits, config.num_experts_per_tok, score=config.router_score, normalize=config.norm_topk_prob,
            expert_bias=self.expert_bias if config.expert_bias else None)
        if tape is not None:
            picked = tape.follow(picked, config.norm_topk_prob)
        weights = picked.weights if config.routed_scaling_factor == 1 else picked.weights * config.routed_scaling_factor
        out = experts(x, self.gate_up, self.down, picked.expert_ids, weights, impl=self.gemm)
        if self.shared is not None:
            out = out + self.shared(x)
        if not with_stats:
            return out, None
        counts = expert_counts(picked.expert_ids, config.num_experts)
        return out, LayerStats(counts, load_balance(picked.scores, picked.expert_ids), z_loss(logits))


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        has_experts = config.num_experts > 1 and layer >= config.num_dense_layers
        self.mlp: MoE | MLP = MoE(config) if has_experts else MLP(config.hidden_size, config.intermediate_size or config.moe_intermediate_size)

    def forward(
        self, x: torch.Tensor, added: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor, layer: int, attend: Attend,
        with_stats: bool, tape: RouteTape | None,
    ) -> tuple[torch.Tensor, torch.Tensor, LayerStats | None]:
        """The residual stream comes and goes as x [T, D] and what the last layer adds to it, for the norm to add up."""
        normed, x = self.attention_norm.add(x, added)
        normed, x = self.mlp_norm.add(x, self.attention(normed, cos, sin, layer, attend))
        if isinstance(self.mlp, MLP):
            return x, self.mlp(normed), None
        return x, *self.mlp(normed, with_stats, tape)


class Transformer(nn.Module):
    """`Transformer(config, vocab_size)`, its weights drawn from `seed` alone, by `initialise`."""

    rope: torch.Tensor
    gemm = "auto"

    def __init__(self, config: ModelConfig, vocab_size: int, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config, self.vocab_size, self.compute_dtype = config, vocab_size, compute_dtype
        # Like all matrices not drawn here: `initialise` does, or a checkpoint fills them in.
        self.embedding = nn.Embedding.from_pretrained(torch.empty(vocab_size, config.hidden_size), freeze=False)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = None if config.tie_word_embeddings else Linear(config.hidden_size, vocab_size)
        table = rope_table(config.max_position_embeddings, rotary_dim(config), config.rope_theta, config.rope_scaling)
        self.register_buffer("rope", table, persistent=False)  # f32[2, max_position_embeddings, R/2]

    @torch.no_grad()
    def initialise(self, seed: int) -> Transformer:
        """Normal draws of std 0.02, each parameter from a generator of its own; what writes to the residual stream is smaller."""
        for index, (name, parameter) in enumerate(self.named_parameters()):
            if parameter.dim() < 2:
                continue  # norm weights stay 1, biases 0
            generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
            is_residual = name.endswith(("out.weight", "down", "down.weight"))
            std = INIT_STD / (2 * self.config.num_hidden_layers) ** 0.5 if is_residual else INIT_STD
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
        return self

    def hold_in(self, dtype: torch.dtype) -> Transformer:
        """Matrices made anew in `dtype`, not yet filled, for a model that is not trained: what the forward would round to `dtype`
        at every use, so not the router, norms and biases."""
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2 and not name.endswith("router"):
                parameter.data = torch.empty_like(parameter, dtype=dtype)
        return self.requires_grad_(False)

    def use_gemm(self, gemm: str) -> Transformer:
        """"auto": projections, experts and head by ops whose rows do not depend on the batch. "torch": by torch's own GEMMs, where
        they may."""
        for module in self.modules():
            if isinstance(module, (Linear, MoE, Transformer)):
                module.gemm = gemm
        return self

    @property
    def head_weight(self) -> torch.Tensor:
        """[V, D], the master: the matrix that turns hidden states into logits, rounded to the compute dtype by the op that does."""
        weight: torch.Tensor = self.embedding.weight if self.head is None else self.head.weight
        return weight

    def forward(
        self, token_ids: torch.Tensor, position_ids: torch.Tensor, attend: Attend, with_stats: bool = False,
        tape: RouteTape | None = None,
    ) -> ModelOutput:
        """token_ids i64[T], position_ids i64|i32[T] -> the hidden states, and with_stats the routers' load; `tape` records the
        routes, or sets them."""
        x = self.embedding(token_ids).to(self.compute_dtype)  # [T, D]
        cos, sin = self.rope[0].index_select(0, position_ids), self.rope[1].index_select(0, position_ids)  # [T, R/2]
        added, seen = None, []
        for layer, block in enumerate(self.blocks):
            x, added, stats = block(x, added, cos, sin, layer, attend, with_stats, tape)
            seen.append(stats)
        hidden, _ = self.norm.add(x, added)
        by_kind = list(zip(*(stats for stats in seen if stats is not None), strict=True))
        if not by_kind:
            return ModelOutput(hidden, None)
        counts, balance, z = (torch.stack(values) for values in by_kind)
        return ModelOutput(hidden, RouterStats(counts, balance.mean() * token_ids.numel(), z.mean() * token_ids.numel()))

    @torch.no_grad()
    def nudge_expert_bias(self, expert_counts: torch.Tensor, rate: float) -> None:
        """Aux-loss-free balancing: bias += rate * sign(mean load - load), from a step's counts i64[M, E] over all ranks."""
        load = expert_counts.float()
        mixtures = [block.mlp for block in self.blocks if isinstance(block.mlp, MoE)]
        for mixture, change in zip(mixtures, rate * torch.sign(load.mean(1, keepdim=True) - load), strict=True):
            mixture.expert_bias += change


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def num_active_parameters(model: Transformer) -> int:
    """Parameters that one token meets: k of the E experts, and all of the rest."""
    idle = 0
    for block in model.blocks:
        if isinstance(block.mlp, MoE):
            routed = block.mlp.gate_up.numel() + block.mlp.down.numel()
            idle += routed - routed * model.config.num_experts_per_tok // model.config.num_experts
    return num_parameters(model) - idle
