"""Weights on disk: exact round trips of every variant, Qwen3-MoE's names and config, and errors that name the damage."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kernels.attention import attention
from reason_rl.config import ModelConfig
from reason_rl.model.hf_config import config_from_json, config_to_json
from reason_rl.model.transformer import Transformer
from reason_rl.model.weights import (
    file_views,
    load_model,
    load_weights,
    read_model_config,
    save_weights,
)
from tests.reason_rl.tiny import VOCAB_SIZE, tiny_model

BASE = ModelConfig(family="qwen3_moe", num_hidden_layers=2, hidden_size=24, num_attention_heads=4, num_key_value_heads=2,
                   head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=10, expert_bias=False,
                   max_position_embeddings=64)
VARIANTS = {
    "plain": BASE,
    "expert bias": replace(BASE, expert_bias=True),
    "dense": replace(BASE, num_experts=1, num_experts_per_tok=1, moe_intermediate_size=ModelConfig.moe_intermediate_size,
                     intermediate_size=10, family="qwen3"),
    "shared experts": replace(BASE, num_shared_experts=2),
    "sigmoid": replace(BASE, router_score="sigmoid", norm_topk_prob=False),
    "no qk-norm": replace(BASE, qk_norm="none"),
    "untied head": replace(BASE, tie_word_embeddings=False),
    "everything": replace(BASE, expert_bias=True, num_shared_experts=1, router_score="sigmoid", norm_topk_prob=False,
                          qk_norm="none", tie_word_embeddings=False, rope_theta=1e6, rms_norm_eps=1e-5, num_key_value_heads=1),
}


def saved(folder: Path, config: ModelConfig = BASE) -> Transformer:
    model = tiny_model(config)
    save_weights(folder, model.state_dict(), config, VOCAB_SIZE, eos_id=3)
    return model


def hidden_of(model: Transformer) -> torch.Tensor:
    tokens = torch.randint(VOCAB_SIZE, (20,), generator=torch.Generator().manual_seed(0))
    segments = torch.tensor([[0, 20, 0, 0]], dtype=torch.int32)
    hidden: torch.Tensor = model(tokens, torch.arange(20), lambda layer, q, k, v: attention(q, k, v, segments)).hidden
    return hidden


def rewrite(folder: Path, **changes: Any) -> None:
    """Change tensors of the saved file; None takes one out."""
    files = load_file(folder / "model.safetensors")
    files.update(changes)
    save_file({name: tensor for name, tensor in files.items() if tensor is not None}, folder / "model.safetensors")


# --- round trips ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", VARIANTS)
def test_saved_weights_load_to_the_same_bits(name: str, tmp_path: Path):
    model = saved(tmp_path / "new" / "folder", VARIANTS[name])
    loaded = load_model(tmp_path / "new" / "folder")
    assert loaded.config == VARIANTS[name] and loaded.vocab_size == VOCAB_SIZE
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    for key in before:
        if "expert_bias" not in key or VARIANTS[name].expert_bias:  # a bias that is not in use is not kept
            assert torch.equal(before[key], after[key]), key
    assert torch.equal(hidden_of(model), hidden_of(loaded))


@pytest.mark.parametrize("name", VARIANTS)
def test_saving_twice_writes_the_same_bytes(name: str, tmp_path: Path):
    for folder in ("a", "b"):
        saved(tmp_path / folder, VARIANTS[name])
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_the_compute_dtype_is_the_callers_and_masters_stay_float32(tmp_path: Path):
    saved(tmp_path)
    model = load_model(tmp_path, torch.bfloat16)
    assert model.compute_dtype == torch.bfloat16 and all(p.dtype == torch.float32 for p in model.parameters())


def test_a_bf16_file_is_read_into_float32(tmp_path: Path):
    model = saved(tmp_path)
    rewrite(tmp_path, **{name: tensor.bfloat16() for name, tensor in load_file(tmp_path / "model.safetensors").items()})
    loaded = load_model(tmp_path)
    for (name, a), b in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert b.dtype == torch.float32 and torch.equal(a.bfloat16().float(), b), name


# --- Qwen3-MoE's names ---------------------------------------------------------------------------------------------------

QWEN3_MOE = {
    "model.embed_tokens.weight": [40, 24],
    "model.layers.0.input_layernorm.weight": [24],
    "model.layers.0.self_attn.q_proj.weight": [32, 24],
    "model.layers.0.self_attn.k_proj.weight": [16, 24],
    "model.layers.0.self_attn.v_proj.weight": [16, 24],
    "model.layers.0.self_attn.o_proj.weight": [24, 32],
    "model.layers.0.self_attn.q_norm.weight": [8],
    "model.layers.0.self_attn.k_norm.weight": [8],
    "model.layers.0.post_attention_layernorm.weight": [24],
    "model.layers.0.mlp.gate.weight": [2, 24],
    "model.layers.0.mlp.experts.0.gate_proj.weight": [10, 24],
    "model.layers.0.mlp.experts.0.up_proj.weight": [10, 24],
    "model.layers.0.mlp.experts.0.down_proj.weight": [24, 10],
    "model.layers.0.mlp.experts.1.gate_proj.weight": [10, 24],
    "model.layers.0.mlp.experts.1.up_proj.weight": [10, 24],
    "model.layers.0.mlp.experts.1.down_proj.weight": [24, 10],
    "model.norm.weight": [24],
    "lm_head.weight": [40, 24],
}


def test_tensor_names_and_shapes_are_qwen3_moes(tmp_path: Path):
    saved(tmp_path, replace(BASE, num_hidden_layers=1, num_experts=2, tie_word_embeddings=False))
    files = load_file(tmp_path / "model.safetensors")
    assert {name: list(tensor.shape) for name, tensor in files.items()} == QWEN3_MOE
    assert all(tensor.dtype == torch.float32 for tensor in files.values())


def test_a_tied_head_is_not_written(tmp_path: Path):
    saved(tmp_path, BASE)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")


def test_dense_layers_have_qwen3s_names():
    names = set(file_views(tiny_model(VARIANTS["dense"]).state_dict(), VARIANTS["dense"]))
    assert {name for name in names if ".layers.0.mlp." in name} == {
        f"model.layers.0.mlp.{which}_proj.weight" for which in ("gate", "up", "down")}


def test_the_fused_matrices_are_cut_where_they_should_be():
    """q above k above v; gate above up; expert by expert."""
    model = tiny_model(BASE)
    files = file_views(model.state_dict(), BASE)
    block = model.blocks[1]
    at = "model.layers.1"
    assert torch.equal(torch.cat([files[f"{at}.self_attn.{p}_proj.weight"] for p in "qkv"]), block.attention.qkv_proj.weight)
    for expert in range(4):
        gate, up, down = (files[f"{at}.mlp.experts.{expert}.{p}_proj.weight"] for p in ("gate", "up", "down"))
        assert torch.equal(torch.cat((gate, up)), block.mlp.gate_up_proj[expert]) and torch.equal(down, block.mlp.down_proj[expert])


def test_tensors_that_qwen3_lacks_have_our_names():
    config = VARIANTS["everything"]
    names = set(file_views(tiny_model(config).state_dict(), config))
    own = {name for name in names if "e_score_correction_bias" in name or "shared_experts" in name}
    assert own == {f"model.layers.{i}.mlp.{name}" for i in range(2) for name in (
        "gate.e_score_correction_bias", "shared_experts.gate_proj.weight", "shared_experts.up_proj.weight",
        "shared_experts.down_proj.weight")}
    assert not any("q_norm" in name or "k_norm" in name for name in names)


# --- config.json ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", VARIANTS)
def test_config_json_holds_the_whole_architecture(name: str):
    values = json.loads(json.dumps(config_to_json(VARIANTS[name], VOCAB_SIZE, eos_id=3)))
    assert config_from_json(values) == (VARIANTS[name], VOCAB_SIZE)
    assert values["eos_token_id"] == 3
    assert values["architectures"] == ["Qwen3ForCausalLM" if name == "dense" else "Qwen3MoeForCausalLM"]


def test_a_foreign_config_is_read_in_both_spellings():
    """The keys of a published Qwen3-MoE config, and those that transformers 5 writes."""
    foreign = {
        "model_type": "qwen3_moe", "vocab_size": 151936, "num_hidden_layers": 48, "hidden_size": 2048,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
        "moe_intermediate_size": 768, "intermediate_size": 6144, "norm_topk_prob": True, "tie_word_embeddings": False,
        "rope_theta": 1000000.0, "rope_scaling": None, "rms_norm_eps": 1e-06, "max_position_embeddings": 40960,
        "hidden_act": "silu", "attention_bias": False, "use_sliding_window": False, "sliding_window": None,
        "decoder_sparse_step": 1, "mlp_only_layers": []}
    config, vocab_size = config_from_json(foreign)
    assert vocab_size == 151936 and config == ModelConfig(
        num_hidden_layers=48, hidden_size=2048, num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128,
        num_experts_per_tok=8, moe_intermediate_size=768, intermediate_size=6144, num_shared_experts=0, router_score="softmax",
        norm_topk_prob=True, expert_bias=False, qk_norm="head",
        family="qwen3_moe", tie_word_embeddings=False, rope_theta=1e6, rms_norm_eps=1e-6, max_position_embeddings=40960)
    newer = {key: value for key, value in foreign.items() if key not in ("num_experts", "rope_theta", "rope_scaling")}
    newer.update(num_local_experts=128, rope_parameters={"rope_theta": 1000000.0, "rope_type": "default"})
    assert config_from_json(newer) == (config, vocab_size)


DEEPSEEK_V3 = {"model_type": "deepseek_v3", "kv_lora_rank": 512}


@pytest.mark.parametrize(("change", "message"), [
    ({"model_type": "gpt2"}, "model_type must be one of llama, qwen2, qwen3, qwen3_moe, .*, got 'gpt2'"),
    ({"model_type": ["qwen3"]}, r"model_type must be one of .*, got \['qwen3'\]"),
    (DEEPSEEK_V3, r"got 'deepseek_v3'; kv_lora_rank = 512: multi-head latent attention \(MLA\)"),
    ({"q_lora_rank": 64}, r"q_lora_rank = 64 is not supported: multi-head latent attention \(MLA\)"),
    ({"quantization_config": {"bits": 4}}, r"quantization_config = {'bits': 4} is not supported: quantised weights"),
    ({"clip_qkv": 8.0}, "clip_qkv = 8.0 is not supported"),
    ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0 is not supported"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0 is not supported"),
    ({"auto_map": {"AutoModel": "m.M"}}, "auto_map = .* is not supported: custom model code"),
    ({"mlp_bias": True}, "mlp_bias must be False, got True"),
    ({"attention_dropout": 0.1}, "attention_dropout must be 0.0, got 0.1"),
    ({"hidden_act": "gelu"}, "hidden_act must be 'silu' or 'swish', got 'gelu'"),
    ({"attention_multiplier": 0.1}, "attention_multiplier = 0.1 is not a known key of qwen3_moe"),
    ({"n_group": 4}, "n_group = 4 is not a known key of qwen3_moe"),
    ({"attention_bias": "yes"}, "attention_bias must be true or false, got 'yes'"),
    ({"use_sliding_window": True, "sliding_window": 32}, "sliding windows are not supported, got .*'sliding_window': 32"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding windows are not supported, got .*'layer_types'"),
    ({"mlp_only_layers": [1], "intermediate_size": 8}, r"dense layers must be the first ones, got mlp_only_layers = \[1\]"),
    ({"mlp_only_layers": [0, 1], "intermediate_size": 8}, "num_dense_layers must be below model.num_hidden_layers = 2, got 2"),
    ({"num_key_value_heads": 3}, "num_attention_heads = 4 must be divisible by model.num_key_value_heads = 3"),
    ({"num_experts_per_tok": 5}, "num_experts_per_tok must be at most"),
    ({"head_dim": 7}, "head_dim must be even"),
    ({"mlp_only_layers": [0]}, "intermediate_size, the width of a dense MLP, must be above 0 .*num_dense_layers = 1, got 0"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1.0 in a qwen3_moe, got 0.5"),
    ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope_type must be default, linear or .*, got 'longrope'"),
    ({"rope_scaling": {"type": "yarn"}}, r"type yarn has the keys .*; missing \['factor'\], unknown \[\]"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0, "mrope_section": [8]}}, r"unknown \['mrope_section'\]"),
    ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor must be a number above 0, got '2'"),
    ({"rope_scaling": {"type": "llama3", "factor": 2, "low_freq_factor": 4, "high_freq_factor": 1}},
     "low_freq_factor = 4 must be below"),
    ({"rope_scaling": {"factor": 2.0}}, r"RoPE of type 'default' has no scaling, got {'factor': 2.0}"),
    ({"reason_rl": {"num_leyers": 2}}, "reason_rl has unknown keys num_leyers"),
    ({"reason_rl": {"qk_norm": "half"}}, "qk_norm must be one of none, head, full, got 'half'"),
], ids=lambda value: "-".join(value) if isinstance(value, dict) else "")  # fmt: skip
def test_an_architecture_that_is_not_ours_is_refused(change: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=f"config.json: .*{message}"):
        config_from_json({**config_to_json(BASE, VOCAB_SIZE, 3), **change})


@pytest.mark.parametrize("change", [
    {"use_sliding_window": False, "sliding_window": 32, "max_window_layers": 1}, {"use_sliding_window": True, "sliding_window": 64},
    {"use_sliding_window": True, "sliding_window": None}, {"layer_types": ["full_attention"] * 2, "sliding_window": 8},
    {"decoder_sparse_step": 1, "mlp_only_layers": None}, {"attention_dropout": 0, "clip_qkv": None, "rope_scaling": None},
    {"quantization_config": None, "use_mrope": False, "_name_or_path": "x", "torch_dtype": "bfloat16", "transformers_version": "4"},
], ids="-".join)  # fmt: skip
def test_a_feature_that_is_named_but_switched_off_is_accepted(change: dict[str, Any]):
    assert config_from_json({**config_to_json(BASE, VOCAB_SIZE, 3), **change}) == (BASE, VOCAB_SIZE)


def test_dense_layers_may_be_given_by_a_step():
    values = config_to_json(BASE, VOCAB_SIZE, 3) | {"decoder_sparse_step": 2, "intermediate_size": 14}
    assert config_from_json(values)[0] == replace(BASE, num_dense_layers=1, intermediate_size=14)
    with pytest.raises(ValueError, match=r"make layers \[0, 2\] of 4 dense"):
        config_from_json(values | {"num_hidden_layers": 4})


def test_windows_that_only_higher_layers_use_count_from_max_window_layers_on():
    config = replace(VARIANTS["dense"], family="qwen2", qk_norm="none", attention_bias="qkv")
    values = config_to_json(config, VOCAB_SIZE, 3) | {"use_sliding_window": True, "sliding_window": 8}
    assert config_from_json(values | {"max_window_layers": 2}) == (config, VOCAB_SIZE)
    with pytest.raises(ValueError, match="sliding windows are not supported"):
        config_from_json(values | {"max_window_layers": 1})


def test_a_default_window_is_detected():
    """Qwen3's sliding_window is 4096 where the key is missing."""
    values = config_to_json(VARIANTS["dense"], VOCAB_SIZE, 3) | {"use_sliding_window": True, "max_window_layers": 0}
    assert "sliding_window" not in values and config_from_json(values)[0].max_position_embeddings == 64
    with pytest.raises(ValueError, match="sliding windows are not supported"):
        config_from_json(values | {"max_position_embeddings": 5000})


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "num_experts", "vocab_size", "max_position_embeddings"])
def test_a_missing_key_is_named(key: str):
    values = config_to_json(BASE, VOCAB_SIZE, 3)
    del values[key]
    with pytest.raises(ValueError, match=f"config.json: {key} is missing"):
        config_from_json(values)


@pytest.mark.parametrize("change", [
    {"hidden_size": "24"}, {"hidden_size": None}, {"hidden_size": 0}, {"num_hidden_layers": 2.5}, {"num_hidden_layers": True},
    {"vocab_size": "many"}, {"vocab_size": [3]}, {"rope_theta": "abc"}, {"rope_theta": {}}, {"rope_parameters": "default"},
    {"reason_rl": [1]}, {"reason_rl": None}, {"norm_topk_prob": 1}, {"tie_word_embeddings": "no"}, {"rms_norm_eps": []},
    {"head_dim": None, "num_attention_heads": 0}, {"head_dim": None, "hidden_size": "24"},
], ids=str)  # fmt: skip
def test_a_value_of_the_wrong_type_is_one_clear_error(change: dict[str, Any]):
    with pytest.raises(ValueError, match=r"^config\.json") as caught:
        config_from_json({**config_to_json(BASE, VOCAB_SIZE, 3), **change})
    assert "\n" not in str(caught.value)


def test_a_dense_configs_expert_sizes_are_not_saved():
    unused = replace(VARIANTS["dense"], num_experts_per_tok=2, moe_intermediate_size=7)
    config, _ = config_from_json(config_to_json(unused, VOCAB_SIZE, 3))
    assert config == VARIANTS["dense"]


# --- damage --------------------------------------------------------------------------------------------------------------

def test_a_missing_tensor_is_named(tmp_path: Path):
    saved(tmp_path)
    rewrite(tmp_path, **{"model.layers.1.mlp.experts.2.up_proj.weight": None})
    with pytest.raises(ValueError, match=r"does not fit.*missing model\.layers\.1\.mlp\.experts\.2\.up_proj\.weight \(1\)"):
        load_model(tmp_path)


def test_an_unexpected_tensor_is_named(tmp_path: Path):
    saved(tmp_path)
    rewrite(tmp_path, **{"model.layers.2.input_layernorm.weight": torch.ones(24)})
    with pytest.raises(ValueError, match=r"does not fit.*unexpected model\.layers\.2\.input_layernorm\.weight \(1\)"):
        load_model(tmp_path)


def test_a_misshapen_tensor_is_named_with_both_shapes(tmp_path: Path):
    saved(tmp_path)
    rewrite(tmp_path, **{"model.layers.0.mlp.gate.weight": torch.zeros(5, 24)})
    with pytest.raises(ValueError, match=r"misshapen model\.layers\.0\.mlp\.gate\.weight: expected \[4, 24\], got \[5, 24\] \(1\)"):
        load_model(tmp_path)


def test_the_weights_of_another_model_are_refused_in_one_line(tmp_path: Path):
    saved(tmp_path, VARIANTS["no qk-norm"])
    with pytest.raises(ValueError, match=r"missing .*q_norm.* \(\d+\); unexpected .* \(\d+\)|missing .*mlp\.down_proj") as caught:
        load_weights(tmp_path, Transformer(VARIANTS["dense"], VOCAB_SIZE))
    assert len(str(caught.value)) < 1500  # a few names and a count, not a thousand


def test_a_failed_load_leaves_the_model_as_it_was(tmp_path: Path):
    saved(tmp_path)
    rewrite(tmp_path, **{"model.norm.weight": None})
    model = tiny_model(BASE, seed=9)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="missing"):
        load_weights(tmp_path, model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("keep", [0, 5, 100, -10])
def test_a_cut_off_weights_file_is_damaged(keep: int, tmp_path: Path):
    saved(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        load_model(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"\xff\xfe", b"null"])
def test_a_damaged_config_is_named(content: bytes, tmp_path: Path):
    saved(tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        load_model(tmp_path)


def test_missing_files_are_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"no checkpoint folder at .*nowhere"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"is not a checkpoint: it has no config\.json"):
        read_model_config(tmp_path)
    saved(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"is not a checkpoint: it has no model\.safetensors"):
        load_model(tmp_path)
