"""Every family is compared with transformers: logits, gradients, RoPE scalings, and our export loaded back."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from kernels.attention import attention
from reason_rl.config import ModelConfig
from reason_rl.model.families import FAMILIES
from reason_rl.model.hf_config import config_from_json, read_model_config
from reason_rl.model.rope import ORIGINAL, rope_table
from reason_rl.model.transformer import Transformer
from reason_rl.model.weights import file_views, load_model, read_source, save_weights
from tests.reason_rl.tiny import tiny_model

transformers = pytest.importorskip("transformers")

EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}
VOCAB = 83
NUM_TOKENS = 64
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 42, "num_hidden_layers": 3, "num_attention_heads": 3, "num_key_value_heads": 1,
    "intermediate_size": 37, "max_position_embeddings": 256, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": None}
EXPERTS: dict[str, Any] = {"num_experts": 7, "num_experts_per_tok": 3}
DEEPSEEK: dict[str, Any] = {
    "n_routed_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 21, "n_shared_experts": 2, "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5, "norm_topk_prob": True}
# name -> (model_type, what differs from COMMON). Sizes are odd where a family allows it.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, biases, tied, wide heads": ("llama", {
        "attention_bias": True, "tie_word_embeddings": True, "head_dim": 20, "rope_theta": 500.0}),
    "qwen2": ("qwen2", {}),
    "qwen2, tied, several kv heads": ("qwen2", {
        "tie_word_embeddings": True, "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3, "rms_norm_eps": 1e-3}),
    "qwen3": ("qwen3", {"head_dim": 10}),
    "qwen3, biases": ("qwen3", {"head_dim": 16, "attention_bias": True, "tie_word_embeddings": True}),
    "qwen3_moe": ("qwen3_moe", {**EXPERTS, "head_dim": 10, "moe_intermediate_size": 21}),
    "qwen3_moe, first layers dense": ("qwen3_moe", {
        **EXPERTS, "head_dim": 16, "moe_intermediate_size": 16, "mlp_only_layers": [0, 1], "norm_topk_prob": True,
        "attention_bias": True}),
    "mixtral": ("mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "mixtral, wide heads": ("mixtral", {
        "num_local_experts": 4, "num_experts_per_tok": 1, "head_dim": 18, "tie_word_embeddings": True}),
    "olmoe": ("olmoe", EXPERTS),
    "olmoe, normalised, biases": ("olmoe", {**EXPERTS, "norm_topk_prob": True, "attention_bias": True, "num_key_value_heads": 3}),
    "dots1": ("dots1", {**DEEPSEEK, "sliding_window": None}),
    "dots1, no dense layer, biases": ("dots1", {
        **DEEPSEEK, "first_k_dense_replace": 0, "norm_topk_prob": False, "attention_bias": True}),
    "glm4_moe": ("glm4_moe", {**DEEPSEEK, "head_dim": 20, "use_qk_norm": True, "attention_bias": True}),
    "glm4_moe, no qk-norm": ("glm4_moe", {
        **DEEPSEEK, "n_shared_experts": 1, "first_k_dense_replace": 2, "partial_rotary_factor": 0.3, "head_dim": 20}),
}
TOLERANCE = 2e-5
"""Of logits up to some 10 in float32, three layers deep, in another order of sums: seen 1e-5 at most."""
BF16_TOLERANCE = 0.12
"""Of logits up to some 4, rounded to 8 bits on their way through three layers, where the experts are the same: seen 0.106 at most,
and 0.110 in transformers' own."""


def theirs(name: str, seed: int = 0, **changes: Any) -> Any:
    """transformers' model with every parameter away from its initial value: also norms, biases and expert biases."""
    kind, own = CASES[name]
    config = transformers.AutoConfig.for_model(kind, **{**COMMON, **own, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, **EAGER).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            if key.endswith("norm.weight") or "layernorm" in key:
                tensor.copy_(1 + 0.3 * noise)
            elif tensor.dim() == 1:
                tensor.copy_(0.2 * noise)
            else:
                tensor.copy_(noise / tensor.shape[-1] ** 0.5)
    return model


def saved(folder: Path, name: str, **changes: Any) -> Any:
    model = theirs(name, **changes)
    model.save_pretrained(folder)
    return model


def tokens(count: int = NUM_TOKENS, vocab_size: int = VOCAB) -> torch.Tensor:
    return torch.randint(vocab_size, (count,), generator=torch.Generator().manual_seed(5))


def our_logits(model: Transformer, ids: torch.Tensor) -> torch.Tensor:
    """f32[T, V]"""
    segments = torch.tensor([[0, len(ids), 0, 0]], dtype=torch.int32)
    hidden = model(ids, torch.arange(len(ids)), lambda layer, q, k, v: attention(q, k, v, segments)).hidden
    return F.linear(hidden, model.head_weight.to(hidden.dtype)).float()


def their_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(ids[None]).logits[0].float()
    return logits


def check_argmax(ours: torch.Tensor, reference: torch.Tensor, tolerance: float, clear_share: float = 0.9) -> None:
    """The greedy next token is the same wherever the tolerance cannot change it; also checks how many those are."""
    top = reference.topk(2, dim=-1).values
    clear = top[:, 0] - top[:, 1] > 2 * tolerance
    assert torch.equal(ours.argmax(-1)[clear], reference.argmax(-1)[clear])
    assert clear.float().mean() > clear_share


def test_transformers_does_not_take_our_kernels_for_its_own():
    """Hugging Face has a package `kernels` too, and transformers reads its version."""
    from transformers.utils.import_utils import is_kernels_available
    assert not is_kernels_available()


def test_every_family_is_compared_with_transformers():
    assert {kind for kind, _ in CASES.values()} == set(FAMILIES)
    assert {"auto", *FAMILIES} == set(get_args(get_type_hints(ModelConfig)["family"]))


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_logits_are_transformers(name: str, tmp_path: Path):
    reference = their_logits(saved(tmp_path, name), tokens())
    model = load_model(tmp_path)
    assert model.config.family == CASES[name][0]
    ours = our_logits(model, tokens())
    torch.testing.assert_close(ours, reference, rtol=0, atol=TOLERANCE)
    check_argmax(ours, reference, TOLERANCE)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_bf16_logits_are_as_near_the_true_ones_as_transformers(name: str, tmp_path: Path):
    """The two round at different points, so their errors against float32 on the same bf16 weights are compared.
    A rounding may also change a routed expert in either model, so the median of the tokens' errors is taken."""
    rounded = theirs(name).bfloat16()
    rounded.save_pretrained(tmp_path)
    exact = their_logits(copy.deepcopy(rounded).float(), tokens())
    ours = our_logits(load_model(tmp_path, torch.bfloat16), tokens())
    held = our_logits(load_model(tmp_path, torch.bfloat16, weights_dtype=torch.bfloat16), tokens())
    assert torch.equal(held, ours)  # masters of bf16 values round to them
    error, their_error = ((logits - exact).abs().amax(-1) for logits in (ours, their_logits(rounded, tokens())))
    assert error.median() < 1.3 * their_error.median()
    near = error < BF16_TOLERANCE
    assert near.float().mean() > 0.8
    check_argmax(ours[near], exact[near], BF16_TOLERANCE, clear_share=0.25)


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_transformers(name: str, tmp_path: Path):
    """Each parameter's gradient of next-token cross-entropy, by the tensor names of transformers' own saver."""
    other = saved(tmp_path, name)
    model = load_model(tmp_path)
    targets = tokens().roll(-1)
    F.cross_entropy(our_logits(model, tokens()), targets).backward()
    F.cross_entropy(other(tokens()[None]).logits[0], targets).backward()
    for parameter in other.parameters():
        parameter.data = parameter.grad
    other.save_pretrained(tmp_path / "gradients")
    wanted = {key: value for key, value in load_file(tmp_path / "gradients" / "model.safetensors").items()
              if not key.endswith("e_score_correction_bias")}
    got = file_views({key: p.grad for key, p in model.named_parameters() if p.grad is not None}, model.config)
    assert got.keys() == wanted.keys()
    for key in wanted:
        # float32 sums over 64 tokens in another order: at most 6e-6 of a tensor's largest, measured. With one expert
        # a token and normalised weights the router's gradient is 0 up to rounding.
        torch.testing.assert_close(got[key], wanted[key], rtol=0, atol=1e-5 * float(wanted[key].abs().max()) + 1e-8)
        assert wanted[key].any() or ".experts." in key, f"{key} has no gradient to compare"


# --- published config.json files, with their extra keys

USUAL = {"attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": [2, 3], "hidden_act": "silu", "initializer_range": 0.02,
         "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True, "tie_word_embeddings": False}
PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": ({
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "head_dim": 64, "hidden_size": 2048,
        "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False, "num_attention_heads": 32,
        "num_hidden_layers": 16, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_theta": 500000.0, "vocab_size": 128256, "tie_word_embeddings": True, "rope_scaling": {
            "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, ORIGINAL: 8192, "rope_type": "llama3"},
    }, {"num_experts": 1, "intermediate_size": 8192, "qk_norm": "none", "attention_bias": "none", "tie_word_embeddings": True}),
    "qwen2": ({
        "hidden_size": 896, "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 21,
        "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1e6,
        "sliding_window": 32768, "use_mrope": False, "use_sliding_window": False, "vocab_size": 151936,
    }, {"head_dim": 64, "attention_bias": "qkv", "qk_norm": "none"}),
    "mixtral": ({
        "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads": 32,
        "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8,
        "output_router_logits": False, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02,
        "sliding_window": None, "vocab_size": 32000,
    }, {"num_experts": 8, "moe_intermediate_size": 14336, "norm_topk_prob": True, "head_dim": 128}),
    "olmoe": ({
        "attention_bias": False, "clip_qkv": None, "hidden_size": 2048, "intermediate_size": 1024, "max_position_embeddings": 4096,
        "norm_topk_prob": False, "num_attention_heads": 16, "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 16,
        "num_key_value_heads": 16, "output_router_logits": False, "pad_token_id": 1, "rms_norm_eps": 1e-05, "rope_scaling": None,
        "rope_theta": 10000.0, "router_aux_loss_coef": 0.01, "vocab_size": 50304,
    }, {"qk_norm": "full", "norm_topk_prob": False, "num_experts": 64, "moe_intermediate_size": 1024}),
    "glm4_moe": ({
        "attention_bias": True, "pad_token_id": 151329, "head_dim": 128, "partial_rotary_factor": 0.5, "hidden_size": 4096,
        "intermediate_size": 10944, "max_position_embeddings": 131072, "moe_intermediate_size": 1408, "norm_topk_prob": True,
        "num_attention_heads": 96, "n_group": 1, "topk_group": 1, "n_routed_experts": 128, "n_shared_experts": 1,
        "routed_scaling_factor": 1.0, "num_experts_per_tok": 8, "first_k_dense_replace": 1, "num_hidden_layers": 46,
        "num_key_value_heads": 8, "num_nextn_predict_layers": 1, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 1000000,
        "use_qk_norm": False, "vocab_size": 151552,
    }, {"attention_bias": "qkv", "qk_norm": "none", "partial_rotary_factor": 0.5, "num_dense_layers": 1, "intermediate_size": 10944,
        "moe_intermediate_size": 1408, "router_score": "sigmoid", "expert_bias": True, "num_shared_experts": 1, "rope_theta": 1e6}),
}


@pytest.mark.parametrize("family", PUBLISHED)
def test_a_config_as_published_is_read(family: str):
    values, wanted = PUBLISHED[family]
    config, vocab_size = config_from_json({**USUAL, **values, "model_type": family})
    assert vocab_size == values["vocab_size"] and config.num_hidden_layers == values["num_hidden_layers"]
    assert {key: getattr(config, key) for key in wanted} == wanted


# --- RoPE

SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, ORIGINAL: 64},
    "yarn": {"factor": 4.0, ORIGINAL: 64},
    # its ramp begins and ends between dimensions, so that a truncation of its ends would fail the test
    "yarn, all keys": {"factor": 8.0, ORIGINAL: 128, "beta_fast": 8.0, "beta_slow": 0.05, "truncate": False, "mscale": 1.0,
                           "mscale_all_dim": 0.5},
    "yarn, attention factor": {"factor": 2.0, ORIGINAL: 128, "attention_factor": 0.7},
}


@pytest.mark.parametrize("family", ["llama", "glm4_moe"])
@pytest.mark.parametrize("name", SCALINGS)
@torch.no_grad()
def test_scaled_rope_is_transformers_beyond_the_original_context(name: str, family: str, tmp_path: Path):
    table = {"rope_type": name.split(",")[0], "rope_theta": 5000.0, **SCALINGS[name]}
    if family == "glm4_moe":
        table["partial_rotary_factor"] = 0.5
    other, ids = saved(tmp_path, family, rope_parameters=table), tokens(250)
    model = load_model(tmp_path)
    reference = their_logits(other, ids)
    # transformers' angles are float32: position * frequency at 250 is off by up to 250 * 2^-24 = 1.5e-5; ours is exact
    torch.testing.assert_close(our_logits(model, ids), reference, rtol=0, atol=1e-4)
    inverse, magnitude = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS[table["rope_type"]](other.config)
    ours = rope_table(2, 2 * len(inverse), 5000.0, model.config.rope_scaling)[:, 1]
    torch.testing.assert_close(torch.atan2(ours[1], ours[0]), inverse, rtol=2e-6, atol=0)
    torch.testing.assert_close(ours.norm(dim=0), torch.full_like(inverse, magnitude), rtol=1e-6, atol=0)
    if name != "dynamic":
        plain = their_logits(theirs(family, rope_parameters={"rope_type": "default", "rope_theta": 5000.0}), ids)
        assert float((plain - reference).abs().max()) > 0.1, "the scaling makes no difference here"


@pytest.mark.parametrize("name", SCALINGS)
def test_both_spellings_of_a_scaling_are_read(name: str, tmp_path: Path):
    kind = name.split(",")[0]
    theirs("llama", rope_parameters={"rope_type": kind, "rope_theta": 5000.0, **SCALINGS[name]}).config.save_pretrained(tmp_path)
    new = read_model_config(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    del values["rope_parameters"]
    for spelling in ("type", "rope_type"):
        old = values | {"rope_theta": 5000.0, "rope_scaling": {spelling: kind, **SCALINGS[name]}}
        (tmp_path / "config.json").write_text(json.dumps(old))
        assert read_model_config(tmp_path) == new
    assert json.loads(new[0].rope_scaling)["rope_type"] == kind


# --- export

def load_back(folder: Path) -> Any:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32, **EAGER)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def scaled(name: str) -> dict[str, Any]:
    """Another theta and a scaling, so that both must be written to config.json."""
    table: dict[str, Any] = {"rope_type": "linear", "rope_theta": 777.0, "factor": 4.0}
    return {"rope_parameters": table | ({"partial_rotary_factor": 0.4} if CASES[name][0] == "glm4_moe" else {})}


@pytest.mark.parametrize("changed", [False, True], ids=["as it is", "scaled rope"])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_our_export_loads_in_transformers_with_equal_logits(name: str, changed: bool, tmp_path: Path):
    other = saved(tmp_path / "in", name, **(scaled(name) if changed else {}))
    model = load_model(tmp_path / "in")
    save_weights(tmp_path / "out", model.state_dict(), model.config, VOCAB, 1, read_source(tmp_path / "in"), shard_bytes=40_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert torch.equal(their_logits(load_back(tmp_path / "out"), tokens()), their_logits(other, tokens()))
    again = load_model(tmp_path / "out")
    assert again.config == model.config
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", CASES)
def test_a_familys_own_keys_describe_it_completely(name: str, tmp_path: Path):
    saved(tmp_path, name)
    config, vocab_size = read_model_config(tmp_path)
    save_weights(tmp_path / "out", tiny_model(config).state_dict(), config, vocab_size, 1)
    assert "reason_rl" not in json.loads((tmp_path / "out" / "config.json").read_text())


SCRATCH = ModelConfig(num_hidden_layers=2, hidden_size=24, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
                      num_experts=4, moe_intermediate_size=10, max_position_embeddings=64)


@pytest.mark.parametrize("changes", [
    {}, {"num_experts": 1, "num_experts_per_tok": 1, "intermediate_size": 12},
    {"num_dense_layers": 1, "intermediate_size": 14, "tie_word_embeddings": False},
    {"family": "llama", "num_experts": 1, "intermediate_size": 12, "qk_norm": "none"}, {"family": "mixtral", "qk_norm": "none"},
    {"family": "olmoe", "qk_norm": "full", "num_key_value_heads": 4, "head_dim": 6, "attention_bias": "all"},
    {"family": "dots1", "router_score": "sigmoid", "expert_bias": True, "num_shared_experts": 1, "routed_scaling_factor": 1.7},
    {"family": "glm4_moe", "router_score": "sigmoid", "expert_bias": True, "num_shared_experts": 1, "partial_rotary_factor": 0.5,
     "attention_bias": "qkv"},
], ids=lambda changes: str(changes.get("family", "auto")) + "-" + "-".join(changes))  # fmt: skip
@torch.no_grad()
def test_a_model_from_scratch_loads_in_transformers_with_equal_logits(changes: dict[str, Any], tmp_path: Path):
    model = tiny_model(ModelConfig(**{**vars(SCRATCH), **changes}), scale=10.0)
    save_weights(tmp_path, model.state_dict(), model.config, model.vocab_size, 1)
    ids = tokens(40, model.vocab_size)
    torch.testing.assert_close(their_logits(load_back(tmp_path), ids), our_logits(model, ids), rtol=0, atol=TOLERANCE)
