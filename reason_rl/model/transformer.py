"""The policy network: a decoder-only transformer with mixture-of-experts layers, in one file.

    tokens -> embedding -> L x [x + attention(norm(x)); x + mlp(norm(x))] -> norm -> hidden states

Training, prefill and op-by-op decode run this forward. They differ in `attn_fn` alone, which attends over the
packed tokens or over the paged KV cache. The LM head is not applied here. The ops that need it take
`model.head_weight`: `linear_grpo_loss` and `linear_logprob` (training), `sample` (engine). So the trainer
never stores [T, V] logits.

Numerics: parameters are float32 masters. The ops round matrices to the compute dtype on use and sum their
gradients in float32. Norms, the router and softmaxes compute in float32. The residual stream is in the
compute dtype.

Left out: dropout, sliding windows, multi-head latent attention.
Letters: T packed tokens, D hidden size, H heads, K kv heads, C head dim, R rotary dim, E experts, k experts
per token, I expert width, V vocabulary, L layers, M of them with experts.
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

AttnFn = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(layer, q [T, H, C], k [T, K, C], v [T, K, C]) -> [T, H, C]"""

INIT_STD = 0.02


class RouterStats(NamedTuple):
    """Router statistics of one forward pass, over its M MoE layers."""

    expert_counts: torch.Tensor
    """i64[M, E]: tokens sent to each expert."""
    balance_loss: torch.Tensor
    """f32[]: load-balance loss, mean over layers, times T: the sum over microbatches is the step's."""
    z_loss: torch.Tensor
    """f32[]: router z-loss, mean over layers, times T."""


class LayerStats(NamedTuple):
    """Router statistics of one MoE layer."""

    expert_counts: torch.Tensor
    """i64[E]"""
    balance_loss: torch.Tensor
    """f32[]"""
    z_loss: torch.Tensor
    """f32[]"""


class ModelOutput(NamedTuple):
    hidden: torch.Tensor
    """[T, D], after the last norm, in the compute dtype."""
    router: RouterStats | None


class RoutedExperts:
    """Records the experts that each MoE layer of a forward pass uses, or replays recorded ones."""

    def __init__(self, replayed: torch.Tensor | None = None) -> None:
        """replayed: i32[T, M, k] as the sampler recorded them, or None to record only."""
        self._replayed = replayed
        self._recorded: list[torch.Tensor] = []  # i64[T, k] of each MoE layer so far

    def apply(self, routed: Route, normalize: bool) -> Route:
        """The next MoE layer's route: `routed` itself, or the replayed experts weighted by its scores, so
        that the router still gets gradients."""
        if self._replayed is not None:
            expert_ids = self._replayed[:, len(self._recorded)].long()  # [T, k]
            weights = routed.scores.gather(1, expert_ids)
            if normalize:
                total = weights[:, :1]
                for choice in range(1, weights.shape[1]):  # `route` adds in this order; .sum(1) rounds differently
                    total = total + weights[:, choice : choice + 1]
                weights = weights / total.clamp(min=1e-20)
            routed = Route(expert_ids, weights, routed.scores)
        self._recorded.append(routed.expert_ids)
        return routed

    def expert_ids(self) -> torch.Tensor:
        """i32[T, M, k]"""
        return torch.stack(self._recorded, dim=1).int()


def gemm_impl(batch_invariant: bool) -> str:
    """The `impl` argument of every op with a matrix product. "torch": torch's own GEMMs, which may round a
    token differently in another batch."""
    return "auto" if batch_invariant else "torch"


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)

    def add(self, x: torch.Tensor, added: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """-> (norm of x + added, x + added). On a GPU both take one pass over memory."""
        return (self(x), x) if added is None else add_rms_norm(added, x, self.weight, self.eps)


class Linear(nn.Module):
    """A projection. The op rounds the weight f32[out, in] to x's dtype; the bias f32[out] is added in f32."""

    batch_invariant = True

    def __init__(self, in_size: int, out_size: int, has_bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_size, in_size))
        self.bias = nn.Parameter(torch.zeros(out_size)) if has_bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = linear(x, self.weight, impl=gemm_impl(self.batch_invariant))
        return y if self.bias is None else (y + self.bias).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions and optional qk-norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        # One matrix for q, k and v: one GEMM instead of three.
        self.qkv_proj = Linear(config.hidden_size, (self.num_heads + 2 * self.num_kv_heads) * self.head_dim,
                               has_bias=config.attention_bias != "none")
        self.o_proj = Linear(self.num_heads * self.head_dim, config.hidden_size, has_bias=config.attention_bias == "all")
        self.q_norm = self.k_norm = None
        if config.qk_norm != "none":
            self.q_norm, self.k_norm = (
                RMSNorm(self.head_dim * (num_heads if config.qk_norm == "full" else 1), config.rms_norm_eps)
                for num_heads in (self.num_heads, self.num_kv_heads))

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, layer: int, attn_fn: AttnFn) -> torch.Tensor:
        heads = self.qkv_proj(x).view(x.shape[0], -1, self.head_dim)  # [T, H + 2K, C]
        q, k, v = heads.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = norm_heads(q, self.q_norm), norm_heads(k, self.k_norm)
        out = attn_fn(layer, rotate_heads(q, cos, sin), rotate_heads(k, cos, sin), v)  # [T, H, C]
        return self.o_proj(out.reshape(x.shape[0], -1))  # [T, H * C] -> [T, D]


def norm_heads(heads: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
    """heads [T, H, C]: each head is normalised alone, or all H * C values together if `norm` is that wide."""
    if norm.weight.shape[0] == heads.shape[2]:
        return norm(heads)  # no reshape: at T = 1 it changes the strides, and a kernel is compiled for its strides
    return norm(heads.reshape(heads.shape[0], -1, norm.weight.shape[0])).view(heads.shape)  # [T, 1, H * C] -> [T, H, C]


def rotate_heads(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the first R dimensions of heads [T, H, C] by the angles [T, R/2]; the others pass through."""
    rotary = 2 * cos.shape[1]
    if rotary == heads.shape[2]:
        return rope(heads, cos, sin)
    return torch.cat((rope(heads[..., :rotary], cos, sin), heads[..., rotary:]), dim=-1)


class MLP(nn.Module):
    """SwiGLU: the MLP of a dense layer, and the shared experts of an MoE layer."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = Linear(hidden_size, 2 * intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(swiglu(self.gate_up_proj(x)))


class MoE(nn.Module):
    """Routed SwiGLU experts, plus shared experts that process every token."""

    expert_bias: torch.Tensor
    batch_invariant = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        num_experts, width = config.num_experts, config.moe_intermediate_size
        self.router = nn.Parameter(torch.empty(num_experts, config.hidden_size))  # [E, D]
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * width, config.hidden_size))  # [E, 2I, D]
        self.down_proj = nn.Parameter(torch.empty(num_experts, config.hidden_size, width))  # [E, D, I]
        self.shared = MLP(config.hidden_size, config.num_shared_experts * width) if config.num_shared_experts else None
        # A buffer: no gradient flows into it, `nudge_expert_bias` updates it after a step.
        self.register_buffer("expert_bias", torch.zeros(num_experts))

    def forward(
        self, x: torch.Tensor, with_stats: bool, routed_experts: RoutedExperts | None
    ) -> tuple[torch.Tensor, LayerStats | None]:
        config, impl = self.config, gemm_impl(self.batch_invariant)
        # Pick k experts for each token: expert_ids and weights [T, k], scores [T, E].
        logits = linear(x.to(self.router.dtype), self.router, impl=impl)  # f32[T, E]
        routed = route(
            logits, config.num_experts_per_tok, score=config.router_score, normalize=config.norm_topk_prob,
            expert_bias=self.expert_bias if config.expert_bias else None)
        if routed_experts is not None:
            routed = routed_experts.apply(routed, config.norm_topk_prob)
        weights = routed.weights if config.routed_scaling_factor == 1 else routed.weights * config.routed_scaling_factor

        # Run them, and the shared ones.
        out = experts(x, self.gate_up_proj, self.down_proj, routed.expert_ids, weights, impl=impl)
        if self.shared is not None:
            out = out + self.shared(x)
        if not with_stats:
            return out, None
        counts = expert_counts(routed.expert_ids, config.num_experts)
        return out, LayerStats(counts, load_balance(routed.scores, routed.expert_ids), z_loss(logits))


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        is_dense = config.num_experts == 1 or layer < config.num_dense_layers
        self.mlp: MoE | MLP = MLP(config.hidden_size, config.intermediate_size) if is_dense else MoE(config)

    def forward(
        self, x: torch.Tensor, added: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor, layer: int, attn_fn: AttnFn,
        with_stats: bool, routed_experts: RoutedExperts | None,
    ) -> tuple[torch.Tensor, torch.Tensor, LayerStats | None]:
        """x, added [T, D] -> (x, added, statistics). The residual stream is x + added; the next norm adds them
        in one pass. `added` is None in the first layer."""
        h, x = self.attention_norm.add(x, added)
        h, x = self.mlp_norm.add(x, self.attention(h, cos, sin, layer, attn_fn))
        if isinstance(self.mlp, MLP):
            return x, self.mlp(h), None
        return x, *self.mlp(h, with_stats, routed_experts)


class Transformer(nn.Module):
    """`Transformer(config, vocab_size)`; `initialise(seed)` or a checkpoint fills its matrices."""

    rope: torch.Tensor
    batch_invariant = True

    def __init__(self, config: ModelConfig, vocab_size: int, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config, self.vocab_size, self.compute_dtype = config, vocab_size, compute_dtype
        # nn.Embedding(...) would draw values; from_pretrained takes the empty matrix as it is.
        self.embedding = nn.Embedding.from_pretrained(torch.empty(vocab_size, config.hidden_size), freeze=False)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = None if config.tie_word_embeddings else Linear(config.hidden_size, vocab_size)
        table = rope_table(config.max_position_embeddings, rotary_dim(config), config.rope_theta, config.rope_scaling)
        self.register_buffer("rope", table, persistent=False)  # f32[2, max_position_embeddings, R/2]

    @torch.no_grad()
    def initialise(self, seed: int) -> Transformer:
        """Normal draws with std 0.02, over sqrt(2L) for matrices that write to the residual stream. Each
        parameter has its own generator, keyed by its index."""
        for index, (name, parameter) in enumerate(self.named_parameters()):
            if parameter.dim() < 2:
                continue  # norm weights stay 1, biases 0
            generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
            is_residual = name.endswith(("o_proj.weight", "down_proj", "down_proj.weight"))
            std = INIT_STD / (2 * self.config.num_hidden_layers) ** 0.5 if is_residual else INIT_STD
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
        return self

    def hold_in(self, dtype: torch.dtype) -> Transformer:
        """Replaces the matrices by empty ones in `dtype`, for a model that is not trained: those that the
        forward rounds to `dtype` on each use, so not the router, norms and biases."""
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2 and not name.endswith("router"):
                parameter.data = torch.empty_like(parameter, dtype=dtype)
        return self.requires_grad_(False)

    def set_batch_invariant(self, batch_invariant: bool) -> Transformer:
        """True (the default): projections, experts and head give a token the same bits in any batch. False:
        they run on torch's own GEMMs, where the ops allow it."""
        for module in self.modules():
            if isinstance(module, (Linear, MoE, Transformer)):
                module.batch_invariant = batch_invariant
        return self

    @property
    def head_weight(self) -> torch.Tensor:
        """[V, D], the master of the LM head; the op that uses it rounds it to the compute dtype."""
        weight: torch.Tensor = self.embedding.weight if self.head is None else self.head.weight
        return weight

    def forward(
        self, token_ids: torch.Tensor, position_ids: torch.Tensor, attn_fn: AttnFn, with_stats: bool = False,
        routed_experts: RoutedExperts | None = None,
    ) -> ModelOutput:
        """token_ids i64[T], position_ids i64|i32[T] -> hidden states; with_stats: router statistics too."""
        x = self.embedding(token_ids).to(self.compute_dtype)  # [T, D]
        cos, sin = self.rope[0].index_select(0, position_ids), self.rope[1].index_select(0, position_ids)  # [T, R/2]
        added, all_stats = None, []
        for layer, block in enumerate(self.blocks):
            x, added, stats = block(x, added, cos, sin, layer, attn_fn, with_stats, routed_experts)
            if stats is not None:
                all_stats.append(stats)
        hidden, _ = self.norm.add(x, added)  # [T, D]
        if not all_stats:
            return ModelOutput(hidden, None)
        counts, balance, z = (torch.stack(values) for values in zip(*all_stats, strict=True))  # [M, E], [M], [M]
        return ModelOutput(hidden, RouterStats(counts, balance.mean() * token_ids.numel(), z.mean() * token_ids.numel()))

    @torch.no_grad()
    def nudge_expert_bias(self, expert_counts: torch.Tensor, rate: float) -> None:
        """Balances load without a loss (arXiv:2408.15664): bias += rate * sign(mean load - load), from a
        step's counts i64[M, E] over all ranks."""
        load = expert_counts.float()
        moe_layers = [block.mlp for block in self.blocks if isinstance(block.mlp, MoE)]
        for moe, change in zip(moe_layers, rate * torch.sign(load.mean(1, keepdim=True) - load), strict=True):
            moe.expert_bias += change


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def num_active_parameters(model: Transformer) -> int:
    """Parameters that process one token: k of the E experts, and everything else."""
    inactive = 0
    for block in model.blocks:
        if isinstance(block.mlp, MoE):
            routed = block.mlp.gate_up_proj.numel() + block.mlp.down_proj.numel()
            inactive += routed - routed * model.config.num_experts_per_tok // model.config.num_experts
    return num_parameters(model) - inactive
