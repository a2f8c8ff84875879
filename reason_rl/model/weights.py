"""Weights on disk: a folder with model.safetensors and config.json, under Qwen3-MoE's tensor names.

The network keeps q, k, v and the experts as fused matrices; the files keep them apart, as Hugging Face does. What Qwen3-MoE has
no word for (expert bias, shared experts, sigmoid scores, a model without qk-norm) is stored under names of its own and in
config.json's "reason_rl" table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from reason_rl.config import ModelConfig
from reason_rl.model.transformer import Transformer

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"

# Ours -> theirs, for what is one tensor on both sides; {i} is the layer.
PLAIN_NAMES = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
    "blocks.{i}.attention_norm.weight": "model.layers.{i}.input_layernorm.weight",
    "blocks.{i}.mlp_norm.weight": "model.layers.{i}.post_attention_layernorm.weight",
    "blocks.{i}.attention.out.weight": "model.layers.{i}.self_attn.o_proj.weight",
    "blocks.{i}.attention.q_norm.weight": "model.layers.{i}.self_attn.q_norm.weight",
    "blocks.{i}.attention.k_norm.weight": "model.layers.{i}.self_attn.k_norm.weight",
    "blocks.{i}.mlp.router": "model.layers.{i}.mlp.gate.weight",
    "blocks.{i}.mlp.expert_bias": "model.layers.{i}.mlp.gate.e_score_correction_bias",
    "blocks.{i}.mlp.down.weight": "model.layers.{i}.mlp.down_proj.weight",
    "blocks.{i}.mlp.shared.down.weight": "model.layers.{i}.mlp.shared_experts.down_proj.weight",
}


def to_files(state: Mapping[str, torch.Tensor], config: ModelConfig) -> dict[str, torch.Tensor]:
    """Our state dict -> tensors by Qwen3-MoE's names."""
    files: dict[str, torch.Tensor] = {}
    sizes = [config.num_heads * config.head_dim] + [config.num_kv_heads * config.head_dim] * 2
    for name, tensor in state.items():
        layer = name.split(".")[1] if name.startswith("blocks.") else ""
        pattern = name.replace(f"blocks.{layer}.", "blocks.{i}.", 1) if layer else name
        theirs = f"model.layers.{layer}"
        if pattern == "blocks.{i}.mlp.expert_bias" and not config.expert_bias:
            continue
        if pattern in PLAIN_NAMES:
            files[PLAIN_NAMES[pattern].format(i=layer)] = tensor
        elif pattern.endswith("attention.qkv.weight"):
            for which, part in zip("qkv", tensor.split(sizes), strict=True):
                files[f"{theirs}.self_attn.{which}_proj.weight"] = part
        elif pattern.endswith("gate_up.weight"):
            place = "mlp.shared_experts" if "shared" in pattern else "mlp"
            for which, part in zip(("gate", "up"), tensor.chunk(2), strict=True):
                files[f"{theirs}.{place}.{which}_proj.weight"] = part
        else:
            assert pattern in ("blocks.{i}.mlp.gate_up", "blocks.{i}.mlp.down"), f"no file name for {name}"
            for expert, matrix in enumerate(tensor.unbind(0)):
                named = zip(("gate", "up"), matrix.chunk(2), strict=True) if pattern.endswith("gate_up") else [("down", matrix)]
                for which, part in named:
                    files[f"{theirs}.mlp.experts.{expert}.{which}_proj.weight"] = part
    return {name: tensor.contiguous() for name, tensor in files.items()}


def from_files(files: Mapping[str, torch.Tensor], model: Transformer) -> dict[str, torch.Tensor]:
    """The inverse of `to_files`, for a model of the same config; missing, unexpected and misshapen tensors are named."""
    expected = to_files(model.state_dict(), model.config)
    missing, unexpected = sorted(expected.keys() - files.keys()), sorted(files.keys() - expected.keys())
    wrong = [f"{n}: expected {list(expected[n].shape)}, got {list(files[n].shape)}"
             for n in sorted(expected.keys() & files.keys()) if expected[n].shape != files[n].shape]
    if missing or unexpected or wrong:
        parts = [f"{what} {', '.join(names[:5])}{' ...' if len(names) > 5 else ''} ({len(names)})"
                 for what, names in (("missing", missing), ("unexpected", unexpected), ("misshapen", wrong)) if names]
        raise ValueError(f"the checkpoint does not fit its config.json: {'; '.join(parts)}")
    state = {}
    for name, tensor in model.state_dict().items():
        pieces = [files[n].float() for n in to_files({name: tensor}, model.config)]
        if name.endswith(("mlp.gate_up", "mlp.down")) and tensor.dim() == 3:
            per_expert = len(pieces) // tensor.shape[0]
            state[name] = torch.stack([torch.cat(pieces[i : i + per_expert]) for i in range(0, len(pieces), per_expert)])
        elif pieces:
            state[name] = torch.cat(pieces)
        else:
            state[name] = tensor  # an expert bias that is not in use
    return state


def config_to_json(config: ModelConfig, vocab_size: int, eos_id: int) -> dict[str, Any]:
    is_moe = config.num_experts > 1
    return {
        "architectures": ["Qwen3MoeForCausalLM" if is_moe else "Qwen3ForCausalLM"],
        "model_type": "qwen3_moe" if is_moe else "qwen3",
        "vocab_size": vocab_size, "eos_token_id": eos_id,
        "num_hidden_layers": config.num_layers, "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_heads, "num_key_value_heads": config.num_kv_heads, "head_dim": config.head_dim,
        "num_experts": config.num_experts, "num_experts_per_tok": min(config.num_experts_per_tok, config.num_experts),
        "moe_intermediate_size": config.expert_size, "intermediate_size": config.expert_size,
        "norm_topk_prob": config.norm_topk, "tie_word_embeddings": config.tie_embeddings,
        "rope_theta": config.rope_theta, "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_positions,
        "hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0, "use_sliding_window": False,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "torch_dtype": "float32",
        "reason_rl": {
            "num_shared_experts": config.num_shared_experts, "router_score": config.router_score,
            "expert_bias": config.expert_bias, "qk_norm": config.qk_norm,
        },
    }


def config_from_json(values: Mapping[str, Any]) -> tuple[ModelConfig, int]:
    """-> (ModelConfig, vocab_size). What is missing, not ours or of the wrong type is a ValueError that says so."""
    try:
        config, vocab_size = _read_config(values)
    except KeyError as error:
        raise ValueError(f"config.json: {error.args[0]} is missing") from error
    except (TypeError, AttributeError, ZeroDivisionError) as error:  # a word where a table or a number belongs
        raise ValueError(f"config.json holds a value of the wrong type: {error}") from error
    _check_value("vocab_size", vocab_size, 1)
    for field in fields(ModelConfig):
        assert field.default is not MISSING
        _check_value(field.name, getattr(config, field.name), field.default)
    return replace(config, rope_theta=float(config.rope_theta)), vocab_size


def _check_value(name: str, value: object, example: object) -> None:
    kinds = (int, float) if isinstance(example, float) else (type(example),)
    if not isinstance(value, kinds) or isinstance(value, bool) != isinstance(example, bool):
        raise ValueError(f"config.json: {name} must be {type(example).__name__}, got {value!r}")
    if isinstance(value, int | float) and not isinstance(value, bool) and not (value > 0 or (value == 0 and example == 0)):
        raise ValueError(f"config.json: {name} must be above 0, got {value!r}")


def _read_config(values: Mapping[str, Any]) -> tuple[ModelConfig, int]:
    family = values.get("model_type")
    if family not in ("qwen3_moe", "qwen3"):
        raise ValueError(f"config.json: model_type must be 'qwen3_moe' or 'qwen3', got {family!r}")
    for key, only in (("use_sliding_window", False), ("attention_bias", False), ("mlp_only_layers", []),
                      ("decoder_sparse_step", 1), ("hidden_act", "silu"), ("rope_scaling", None)):
        if values.get(key) not in (only, None):
            raise ValueError(f"config.json: {key} must be {only!r}, got {values[key]!r}")
    # transformers 5 writes rope_parameters and num_local_experts where earlier ones had rope_theta and num_experts.
    rotary = values.get("rope_parameters") or {"rope_theta": values.get("rope_theta", 10000.0)}
    if rotary.get("rope_type", "default") != "default":
        raise ValueError(f"config.json: rope_parameters.rope_type must be 'default', got {rotary['rope_type']!r}")
    is_moe, own = family == "qwen3_moe", values.get("reason_rl", {})
    config = ModelConfig(
        num_layers=values["num_hidden_layers"], hidden_size=values["hidden_size"], num_heads=values["num_attention_heads"],
        num_kv_heads=values["num_key_value_heads"],
        head_dim=values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"],
        num_experts=(values.get("num_local_experts") or values["num_experts"]) if is_moe else 1,
        num_experts_per_tok=values["num_experts_per_tok"] if is_moe else 1,
        expert_size=values["moe_intermediate_size"] if is_moe else values["intermediate_size"],
        num_shared_experts=own.get("num_shared_experts", 0), router_score=own.get("router_score", "softmax"),
        norm_topk=values.get("norm_topk_prob", not is_moe), expert_bias=own.get("expert_bias", False),
        qk_norm=own.get("qk_norm", True), tie_embeddings=values.get("tie_word_embeddings", False),
        rope_theta=rotary["rope_theta"], rms_norm_eps=values.get("rms_norm_eps", 1e-6),
        max_positions=values["max_position_embeddings"])
    return config, values["vocab_size"]


def save_weights(folder: Path, state: Mapping[str, torch.Tensor], config: ModelConfig, vocab_size: int, eos_id: int) -> None:
    """`state` by our names, whole tensors (see trainer.distributed.full_state)."""
    folder.mkdir(parents=True, exist_ok=True)
    # safetensors refuses tensors that share memory (slices of fused matrices do), so each is cloned.
    files = {name: tensor.detach().cpu().clone() for name, tensor in to_files(state, config).items()}
    save_file(files, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / CONFIG_FILE).write_text(json.dumps(config_to_json(config, vocab_size, eos_id), indent=2) + "\n")


def read_model_config(folder: Path) -> tuple[ModelConfig, int]:
    """config.json of a checkpoint folder -> (ModelConfig, vocab_size)."""
    if not folder.is_dir():
        raise ValueError(f"no checkpoint folder at {folder}")
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"{folder} is not a checkpoint: it has no {CONFIG_FILE}")
    try:
        values = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} is damaged: it must hold a table, got {type(values).__name__}")
    return config_from_json(values)


def load_weights(folder: Path, model: Transformer) -> None:
    """Fill `model` (not yet sharded) from the folder's safetensors."""
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise ValueError(f"{folder} is not a checkpoint: it has no {WEIGHTS_FILE}")
    try:
        files = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    model.load_state_dict(from_files(files, model))


def load_model(folder: str | Path, compute_dtype: torch.dtype = torch.float32) -> Transformer:
    """The model of a checkpoint folder, on the CPU."""
    folder = Path(folder)
    config, vocab_size = read_model_config(folder)
    model = Transformer(config, vocab_size, compute_dtype)
    load_weights(folder, model)
    return model
