"""The network against a plain float64 version; packing, gradients, balancing and initialisation of every variant."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from kernels.attention import attention, plan_segments
from kernels.linear_logprob import linear_logprob
from kernels.rms_norm import rms_norm
from reason_rl.config import ModelConfig
from reason_rl.model import transformer
from reason_rl.model.rope import rope_table
from reason_rl.model.transformer import ModelOutput, MoE, Transformer, num_active_parameters, num_parameters
from reason_rl.model.weights import file_views
from tests.reason_rl.tiny import VOCAB_SIZE, tiny_model

BASE = ModelConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=12,
                   num_experts=5, num_experts_per_tok=2, moe_intermediate_size=20, num_shared_experts=0, router_score="softmax",
                   norm_topk_prob=True, expert_bias=True, qk_norm="head", tie_word_embeddings=True, max_position_embeddings=256)
DENSE = replace(BASE, num_experts=1, num_experts_per_tok=1, intermediate_size=20)
VARIANTS = {
    "softmax": BASE,
    "no bias": replace(BASE, expert_bias=False),
    "dense": DENSE,
    "shared experts": replace(BASE, num_shared_experts=2),
    "sigmoid": replace(BASE, router_score="sigmoid"),
    "scores as they are": replace(BASE, norm_topk_prob=False),
    "no qk-norm": replace(BASE, qk_norm="none"),
    "untied head": replace(BASE, tie_word_embeddings=False),
    "one expert a token": replace(BASE, num_experts_per_tok=1, norm_topk_prob=False),
    "every expert": replace(BASE, num_experts_per_tok=5),
    "one kv head": replace(BASE, num_key_value_heads=1, rope_theta=500.0, rms_norm_eps=1e-3),
    "biases": replace(BASE, attention_bias="all"),
    "biases but the output's, dense": replace(DENSE, attention_bias="qkv"),
    "qk-norm over all heads": replace(BASE, qk_norm="full"),
    "first layer dense": replace(BASE, num_dense_layers=1, intermediate_size=28),
    "scaled routes, shared": replace(BASE, routed_scaling_factor=2.5, router_score="sigmoid", num_shared_experts=1),
    "a third of a head turned": replace(BASE, partial_rotary_factor=1 / 3),
}
Segment = tuple[int, int, int, int]


def lively(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> Transformer:
    """A model with norm weights away from 1 and large matrices, so that every parameter changes the output."""
    model = tiny_model(config, seed, dtype)
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
    return model


def run(model: Transformer, token_ids: Sequence[int], positions: Sequence[int], segments: Sequence[Segment]) -> ModelOutput:
    plan = plan_segments(torch.tensor(segments, dtype=torch.int32), len(token_ids))
    output: ModelOutput = model(
        torch.tensor(token_ids), torch.tensor(positions), lambda layer, q, k, v: attention(q, k, v, plan), with_stats=True)
    return output


def document(length: int, seed: int) -> list[int]:
    return torch.randint(VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


# --- a float64 version, by Hugging Face's tensor names -------------------------------------------------------------------

def normed(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def turned(x: torch.Tensor, position: int, theta: float) -> torch.Tensor:
    """One head at one position: pairs (c, c + C/2) as complex numbers."""
    half = x.shape[0] // 2  # of the rotated part
    angle = torch.tensor([position * theta ** (-2 * c / x.shape[0]) for c in range(half)], dtype=torch.float64)
    z = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((z.real, z.imag))


def mlp(x: torch.Tensor, w: dict[str, torch.Tensor], place: str) -> torch.Tensor:
    gate = w[f"{place}.gate_proj.weight"] @ x
    return w[f"{place}.down_proj.weight"] @ (gate * torch.sigmoid(gate) * (w[f"{place}.up_proj.weight"] @ x))


def moe_by_hand(x: torch.Tensor, w: dict[str, torch.Tensor], place: str, config: ModelConfig) -> tuple[torch.Tensor, list[int]]:
    logits = w[f"{place}.gate.weight"] @ x
    scores = torch.sigmoid(logits) if config.router_score == "sigmoid" else torch.softmax(logits, dim=0)
    bias = w.get(f"{place}.gate.e_score_correction_bias", torch.zeros_like(scores))
    chosen = sorted(range(config.num_experts), key=lambda e: (-float(scores[e] + bias[e]), e))[: config.num_experts_per_tok]
    total = sum(float(scores[e]) for e in chosen) if config.norm_topk_prob else 1.0
    out = sum((scores[e] / total * mlp(x, w, f"{place}.experts.{e}") for e in chosen), torch.zeros_like(x))
    out = out * config.routed_scaling_factor
    if config.num_shared_experts:
        out = out + mlp(x, w, f"{place}.shared_experts")
    return out, chosen


def by_hand(model: Transformer, tokens: list[int]) -> tuple[torch.Tensor, list[list[list[int]]]]:
    """One document, token by token -> hidden f64[T, D], and the experts chosen [M][T][k]."""
    config = model.config
    w = {name: tensor.double() for name, tensor in file_views(model.state_dict(), config).items()}
    rows = list(w["model.embed_tokens.weight"][tokens])
    chosen: list[list[list[int]]] = []
    for i in range(config.num_hidden_layers):
        at, layer_chosen, has_experts = f"model.layers.{i}", [], config.num_experts > 1 and i >= config.num_dense_layers
        keys: list[torch.Tensor] = []
        values: list[torch.Tensor] = []
        for t, row in enumerate(rows):
            x = normed(row, w[f"{at}.input_layernorm.weight"], config.rms_norm_eps)
            q, k, v = (w[f"{at}.self_attn.{p}_proj.weight"] @ x + w.get(f"{at}.self_attn.{p}_proj.bias", 0.0) for p in "qkv")
            if config.qk_norm == "full":
                q, k = (normed(h, w[f"{at}.self_attn.{p}_norm.weight"], config.rms_norm_eps) for h, p in ((q, "q"), (k, "k")))
            q, k, v = (h.view(-1, config.head_dim) for h in (q, k, v))
            if config.qk_norm == "head":
                q, k = (normed(h, w[f"{at}.self_attn.{p}_norm.weight"], config.rms_norm_eps) for h, p in ((q, "q"), (k, "k")))
            rotary = int(config.head_dim * config.partial_rotary_factor)
            q, k = (torch.stack([torch.cat((turned(head[:rotary], t, config.rope_theta), head[rotary:])) for head in heads])
                    for heads in (q, k))
            keys.append(k)
            values.append(v)
            heads = []
            for h in range(config.num_attention_heads):
                kv = h // (config.num_attention_heads // config.num_key_value_heads)
                scores = torch.stack([key[kv] @ q[h] / math.sqrt(config.head_dim) for key in keys])
                heads.append(torch.softmax(scores, dim=0) @ torch.stack([value[kv] for value in values]))
            row = row + w[f"{at}.self_attn.o_proj.weight"] @ torch.cat(heads) + w.get(f"{at}.self_attn.o_proj.bias", 0.0)
            x = normed(row, w[f"{at}.post_attention_layernorm.weight"], config.rms_norm_eps)
            out, experts = moe_by_hand(x, w, f"{at}.mlp", config) if has_experts else (mlp(x, w, f"{at}.mlp"), [])
            rows[t] = row + out
            layer_chosen.append(experts)
        chosen += [layer_chosen] if has_experts else []
    return torch.stack([normed(row, w["model.norm.weight"], config.rms_norm_eps) for row in rows]), chosen


@pytest.mark.parametrize("name", VARIANTS)
def test_the_model_is_its_float64_transcription(name: str):
    model, tokens = lively(VARIANTS[name]), document(20, seed=3)
    output = run(model, tokens, range(20), [(0, 20, 0, 0)])
    hidden, chosen = by_hand(model, tokens)
    # f32 through two layers of about 10 products each, values up to 10: at most 3e-6, measured
    torch.testing.assert_close(output.hidden.double(), hidden, rtol=0, atol=2e-5)
    if output.router is not None:
        counts = [[sum(experts.count(e) for experts in layer) for e in range(model.config.num_experts)] for layer in chosen]
        assert output.router.expert_counts.tolist() == counts
    head = model.embedding.weight if model.head is None else model.head.weight
    logits = hidden @ head.double().T
    logprob, _ = linear_logprob(output.hidden, model.head_weight, torch.tensor(tokens))
    want = torch.log_softmax(logits, dim=-1).gather(1, torch.tensor(tokens)[:, None]).squeeze(1)
    torch.testing.assert_close(logprob.double(), want, rtol=0, atol=1e-4)  # logits are sums of 32 hidden values


def test_the_rope_table_is_cos_and_sin_of_position_times_frequency():
    table = rope_table(300, 8, 10000.0)
    assert table.shape == (2, 300, 4) and table.dtype == torch.float32
    for position, c in ((0, 0), (1, 0), (299, 0), (299, 3), (17, 2)):
        angle = position * 10000.0 ** (-2 * c / 8)
        # computed in f64 and rounded once: half an ulp of 1
        assert table[:, position, c].tolist() == pytest.approx([math.cos(angle), math.sin(angle)], abs=6e-8)


# --- gradients -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_reach_every_parameter(name: str, dtype: torch.dtype):
    model = lively(VARIANTS[name], dtype=dtype)
    tokens = document(60, seed=1)
    output = run(model, tokens, [*range(40), *range(40, 60)], [(0, 40, 0, 0), (40, 20, 0, 40)])
    assert output.hidden.dtype == dtype and model.head_weight.dtype == torch.float32
    logprob, _ = linear_logprob(output.hidden, model.head_weight, torch.tensor(document(60, seed=2)))
    logprob.sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), parameter_name
        if parameter.dim() < 3:
            assert parameter.grad.any(), parameter_name
        else:  # experts: exactly those with a token
            assert output.router is not None
            used = output.router.expert_counts[int(parameter_name.split(".")[1]) - model.config.num_dense_layers] > 0
            assert torch.equal(parameter.grad.flatten(1).any(1), used) and used.sum() >= 2, parameter_name


def test_the_heads_of_one_token_are_normed_with_the_strides_of_many(monkeypatch: pytest.MonkeyPatch):
    """Kernels are compiled by stride; a reshape could give a single token others, and so another order of its sums."""
    seen: list[tuple[int, ...]] = []

    def note(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        seen.append(x.stride())
        return rms_norm(x, weight, eps)

    monkeypatch.setattr(transformer, "rms_norm", note)
    for length in (1, 2):
        run(tiny_model(BASE), document(length, seed=1), range(length), [(0, length, 0, 0)])
    assert seen[: len(seen) // 2] == seen[len(seen) // 2 :]


def test_the_balance_loss_reaches_the_router_alone_at_the_last_layer():
    model = lively(replace(BASE, num_hidden_layers=1))
    output = run(model, document(30, seed=1), range(30), [(0, 30, 0, 0)])
    assert output.router is not None
    output.router.balance_loss.backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert "blocks.0.mlp.router" in reached
    assert not reached & {"blocks.0.mlp.gate_up_proj", "blocks.0.mlp.down_proj", "norm.weight"}


# --- packing -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["softmax", "dense", "shared experts", "sigmoid", "no qk-norm", "biases", "qk-norm over all heads",
                                  "first layer dense", "scaled routes, shared", "a third of a head turned"])
def test_a_documents_hidden_rows_have_the_same_bits_in_any_pack(name: str, dtype: torch.dtype):
    model = lively(VARIANTS[name], dtype=dtype)
    documents = [document(length, seed=length) for length in (1, 3, 47, 123, 16, 33, 2)]
    with torch.no_grad():
        alone = [run(model, d, range(len(d)), [(0, len(d), 0, 0)]).hidden for d in documents]
        for order in ([0, 1, 2, 3, 4, 5, 6], [6, 3, 0, 5], [2, 2, 2], [1, 4]):
            tokens: list[int] = []
            positions: list[int] = []
            segments: list[Segment] = []
            for which in order:
                segments.append((len(tokens), len(documents[which]), 0, 0))
                tokens += documents[which]
                positions += range(len(documents[which]))
            packed = run(model, tokens, positions, segments).hidden
            for which, (start, length, _, _) in zip(order, segments, strict=True):
                assert torch.equal(packed[start : start + length], alone[which]), (order, which)


def test_a_completion_has_the_same_bits_alone_with_its_prompt_and_with_its_group():
    model = lively(BASE)
    prompt, completions = document(21, seed=0), [document(n, seed=n) for n in (5, 1, 40, 17)]
    tokens, positions, segments = list(prompt), list(range(21)), [(0, 21, 0, 0)]
    for c in completions:
        segments.append((len(tokens), len(c), 0, 21))
        tokens += c
        positions += range(21, 21 + len(c))
    with torch.no_grad():
        group = run(model, tokens, positions, segments).hidden
        for c, (start, length, _, _) in zip(completions, segments[1:], strict=True):
            pair = run(model, prompt + c, range(21 + length), [(0, 21, 0, 0), (21, length, 0, 21)]).hidden
            assert torch.equal(pair[:21], group[:21]) and torch.equal(pair[21:], group[start : start + length])


def test_statistics_add_up_over_packs():
    model = lively(BASE)
    first, second = document(30, seed=1), document(50, seed=2)
    with torch.no_grad():
        parts = [run(model, d, range(len(d)), [(0, len(d), 0, 0)]).router for d in (first, second)]
        whole = run(model, first + second, [*range(30), *range(50)], [(0, 30, 0, 0), (30, 50, 0, 0)]).router
    assert whole is not None and parts[0] is not None and parts[1] is not None
    assert torch.equal(whole.expert_counts, parts[0].expert_counts + parts[1].expert_counts)
    assert whole.expert_counts.sum(1).tolist() == [160, 160]  # 80 tokens, 2 experts each, in both layers
    assert parts[0].balance_loss > 30 * 0.9  # per token near 1 when even, more when not


def test_router_statistics_need_a_request_and_experts():
    tokens, positions = torch.tensor([1, 2, 3]), torch.arange(3)
    plan = plan_segments(torch.tensor([[0, 3, 0, 0]], dtype=torch.int32), 3)
    for name in ("softmax", "dense"):
        model = lively(VARIANTS[name])
        assert model(tokens, positions, lambda layer, q, k, v: attention(q, k, v, plan)).router is None
    assert run(lively(VARIANTS["dense"]), [1, 2, 3], range(3), [(0, 3, 0, 0)]).router is None


# --- balancing by bias ---------------------------------------------------------------------------------------------------

def test_nudging_moves_each_bias_against_its_load_by_the_rate():
    model = Transformer(BASE, VOCAB_SIZE).initialise(0)
    model.nudge_expert_bias(torch.tensor([[10, 0, 4, 3, 3], [4, 4, 4, 4, 4]]), rate=0.5)
    biases = [block.mlp.expert_bias.tolist() for block in model.blocks if isinstance(block.mlp, MoE)]
    assert biases == [[-0.5, 0.5, 0.0, 0.5, 0.5], [0.0] * 5]  # means: 4 and 4


def test_nudging_leaves_dense_layers_out():
    model = Transformer(VARIANTS["first layer dense"], VOCAB_SIZE).initialise(0)
    model.nudge_expert_bias(torch.tensor([[10, 0, 4, 3, 3]]), rate=0.5)
    assert [block.mlp.expert_bias.tolist() for block in model.blocks if isinstance(block.mlp, MoE)] == [[-0.5, 0.5, 0.0, 0.5, 0.5]]


def test_nudging_evens_out_a_crowded_router():
    model = lively(BASE)
    for block in model.blocks:
        assert isinstance(block.mlp, MoE)
        block.mlp.expert_bias.copy_(torch.tensor([1.5, 0.0, 0.0, 0.0, 0.0]))  # softmax scores are below 1: expert 0 always
    tokens = document(200, seed=0)

    def counts() -> torch.Tensor:
        with torch.no_grad():
            router = run(model, tokens, range(200), [(0, 200, 0, 0)]).router
        assert router is not None
        return router.expert_counts

    assert counts()[:, 0].tolist() == [200, 200]
    for _ in range(120):
        model.nudge_expert_bias(counts(), rate=0.02)
    spread = (counts().float() - 80).abs().max()  # 400 choices over 5 experts: 80 each
    assert spread < 30


def test_the_bias_has_no_gradient_and_no_effect_when_switched_off():
    model = lively(VARIANTS["no bias"])
    assert not any("expert_bias" in name for name, _ in model.named_parameters())
    tokens = document(30, seed=0)
    before = run(model, tokens, range(30), [(0, 30, 0, 0)]).hidden
    model.nudge_expert_bias(torch.tensor([[9, 0, 0, 0, 0]] * 2), rate=100.0)
    assert torch.equal(run(model, tokens, range(30), [(0, 30, 0, 0)]).hidden, before)


# --- weights -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", VARIANTS)
def test_weights_follow_from_the_seed_alone(name: str):
    torch.manual_seed(1)
    first = Transformer(VARIANTS[name], VOCAB_SIZE).initialise(7).state_dict()
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = Transformer(VARIANTS[name], VOCAB_SIZE)
    torch.manual_seed(2)
    again = second.initialise(7).state_dict()
    assert torch.equal(torch.get_rng_state(), state), "initialise drew from the global generator"
    assert all(torch.equal(first[key], again[key]) for key in first)
    other = Transformer(VARIANTS[name], VOCAB_SIZE).initialise(8).state_dict()
    assert all(not torch.equal(first[key], other[key]) for key in first if first[key].dim() > 1)


def test_fresh_weights_have_their_spread_and_no_two_are_alike():
    config = replace(BASE, hidden_size=128, num_hidden_layers=2, num_shared_experts=1)
    state = Transformer(config, VOCAB_SIZE).initialise(0).state_dict()
    for name, tensor in state.items():
        if tensor.dim() < 2:
            assert torch.equal(tensor, torch.zeros_like(tensor) if "bias" in name else torch.ones_like(tensor)), name
            continue
        writes_to_the_stream = name.endswith(("o_proj.weight", "down_proj", "down_proj.weight"))
        expected = 0.02 / 2 if writes_to_the_stream else 0.02  # scaled by (2 * 2 layers)^-1/2
        # the spread of n draws is off by 1 / sqrt(2n), n >= 640 for the routers: five of those
        assert float(tensor.std()) == pytest.approx(expected, rel=5 / math.sqrt(2 * tensor.numel())), name
    flat = [tensor.flatten()[:64] for tensor in state.values() if tensor.dim() > 1]
    assert len(torch.stack(flat).unique(dim=0)) == len(flat)


@pytest.mark.parametrize("name", VARIANTS)
def test_active_parameters_are_those_that_one_token_uses(name: str):
    config = VARIANTS[name]
    model = Transformer(config, VOCAB_SIZE)
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    idle = (config.num_experts - config.num_experts_per_tok) * expert * (config.num_hidden_layers - config.num_dense_layers)
    assert num_active_parameters(model) == num_parameters(model) - idle
    assert num_parameters(model) == sum(p.numel() for p in model.parameters())


def test_the_tied_head_is_the_embedding_and_the_untied_one_is_not():
    tied, untied = (Transformer(VARIANTS[name], VOCAB_SIZE).initialise(0) for name in ("softmax", "untied head"))
    assert tied.head_weight is tied.embedding.weight
    assert untied.head is not None and untied.head_weight is untied.head.weight
    assert not torch.equal(untied.head_weight, untied.embedding.weight)
    assert num_parameters(untied) - num_parameters(tied) == VOCAB_SIZE * BASE.hidden_size
