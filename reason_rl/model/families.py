"""Hugging Face's model families as data: names of tensors, keys of config.json, and switches.

hf_config.py reads and writes config.json by this table, weights.py the tensors. transformer.py does not
import it: the network depends on ModelConfig alone. A new family is one entry of FAMILIES, plus a tiny model
in tests/reason_rl/model/test_families.py that is compared with transformers'.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

AT = "model.layers.{i}."

# Our tensor -> the family's; {i} is the layer, {e} the expert. Several names split our matrix along its first
# dimension, in order: q, k, v; gate, up.
TENSORS: dict[str, tuple[str, ...]] = {
    "embedding.weight": ("model.embed_tokens.weight",),
    "norm.weight": ("model.norm.weight",),
    "head.weight": ("lm_head.weight",),
    "blocks.{i}.attention_norm.weight": (AT + "input_layernorm.weight",),
    "blocks.{i}.mlp_norm.weight": (AT + "post_attention_layernorm.weight",),
    "blocks.{i}.attention.qkv_proj.weight": tuple(f"{AT}self_attn.{p}_proj.weight" for p in "qkv"),
    "blocks.{i}.attention.qkv_proj.bias": tuple(f"{AT}self_attn.{p}_proj.bias" for p in "qkv"),
    "blocks.{i}.attention.o_proj.weight": (AT + "self_attn.o_proj.weight",),
    "blocks.{i}.attention.o_proj.bias": (AT + "self_attn.o_proj.bias",),
    "blocks.{i}.attention.q_norm.weight": (AT + "self_attn.q_norm.weight",),
    "blocks.{i}.attention.k_norm.weight": (AT + "self_attn.k_norm.weight",),
    "blocks.{i}.mlp.gate_up_proj.weight": (AT + "mlp.gate_proj.weight", AT + "mlp.up_proj.weight"),
    "blocks.{i}.mlp.down_proj.weight": (AT + "mlp.down_proj.weight",),
    "blocks.{i}.mlp.router": (AT + "mlp.gate.weight",),
    "blocks.{i}.mlp.expert_bias": (AT + "mlp.gate.e_score_correction_bias",),
    "blocks.{i}.mlp.gate_up_proj": (AT + "mlp.experts.{e}.gate_proj.weight", AT + "mlp.experts.{e}.up_proj.weight"),
    "blocks.{i}.mlp.down_proj": (AT + "mlp.experts.{e}.down_proj.weight",),
    "blocks.{i}.mlp.shared.gate_up_proj.weight": (
        AT + "mlp.shared_experts.gate_proj.weight", AT + "mlp.shared_experts.up_proj.weight"),
    "blocks.{i}.mlp.shared.down_proj.weight": (AT + "mlp.shared_experts.down_proj.weight",),
}
# Old Llama files store these; they follow from the config.
DERIVED_TENSORS = ("rotary_emb.inv_freq",)

# ModelConfig fields that config.json holds. The key is the field's name, unless Family.renamed has another.
COMMON = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim",
          "tie_word_embeddings", "rms_norm_eps", "max_position_embeddings", "rope_theta")
DENSE = (*COMMON, "intermediate_size")
EXPERTS = (*COMMON, "num_experts", "num_experts_per_tok", "moe_intermediate_size")
DEEPSEEK = (*EXPERTS, "norm_topk_prob", "num_shared_experts", "routed_scaling_factor", "intermediate_size")

# Values of missing or null keys: constants, or functions of the other keys. All other keys are required.
DEFAULTS: dict[str, Any] = {
    "tie_word_embeddings": False, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "num_key_value_heads": lambda values: values["num_attention_heads"],
    "head_dim": lambda values: values["hidden_size"] // values["num_attention_heads"]}
# Keys with one supported meaning, which a missing or null key has too; any other value is refused.
ONLY: dict[str, tuple[Any, ...]] = {"hidden_act": ("silu", "swish"), "attention_dropout": (0.0,), "mlp_bias": (False,)}
# Keys that every family refuses, with the reason.
REFUSED = {
    "kv_lora_rank": "multi-head latent attention (MLA)", "q_lora_rank": "multi-head latent attention (MLA)",
    "quantization_config": "quantised weights", "attn_logit_softcapping": "capped attention logits",
    "final_logit_softcapping": "capped logits", "attention_chunk_size": "chunked attention",
    "no_rope_layers": "layers without RoPE", "clip_qkv": "clipped queries, keys and values",
    "logit_scale": "scaled logits", "auto_map": "custom model code",
}
# Keys that do not change a model's maths: training, generation, bookkeeping.
HARMLESS = frozenset((
    "architectures", "model_type", "vocab_size", "reason_rl", "transformers_version", "torch_dtype", "dtype", "name_or_path",
    "initializer_range", "use_cache", "pretraining_tp", "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id",
    "tokenizer_class", "return_dict", "chunk_size_feed_forward", "id2label", "label2id", "problem_type", "output_router_logits",
    "router_aux_loss_coef", "aux_loss_alpha", "seq_aux", "ep_size", "attn_implementation", "unsloth_fixed", "unsloth_version",
    "is_llama_config", "transformers.js_config", "num_nextn_predict_layers"))


@dataclass(frozen=True)
class Family:
    """How one `model_type` of Hugging Face maps to ModelConfig and to our tensors."""

    architecture: str
    """The class that transformers builds."""
    fields: tuple[str, ...]
    """ModelConfig fields that its config.json holds."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """ModelConfig fields with one value in the whole family."""
    switches: Mapping[str, tuple[str, str, str]] = field(default_factory=dict)
    """ModelConfig field -> (boolean key, the field's value if false or missing, if true)."""
    renamed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """ModelConfig field -> its key here, then other spellings that are read (transformers 5 renamed some)."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Overrides DEFAULTS."""
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Extends ONLY."""
    dense_key: str = ""
    """The key that selects the dense layers of a model with experts."""
    ignored: tuple[str, ...] = ()
    """Keys that its models do not read."""
    written: Mapping[str, Any] = field(default_factory=dict)
    """Further keys of the config.json that we write."""
    tensors: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Overrides TENSORS."""

    def keys(self) -> dict[str, tuple[str, ...]]:
        """ModelConfig field -> its spellings in config.json; the first is written."""
        return {name: self.renamed.get(name, (name,)) for name in self.fields}

    def default(self, key: str) -> Any:
        return self.defaults.get(key, DEFAULTS.get(key))


NO_EXPERTS = {"num_experts": 1, "num_experts_per_tok": 1}
BIAS_ALL = {"attention_bias": ("attention_bias", "none", "all")}
WINDOW = {"use_sliding_window": False, "sliding_window": 4096}
EXPERTS_RENAMED = {"num_experts": ("num_experts", "num_local_experts")}
# The routing of DeepSeek-V3 (arXiv:2412.19437, 2.1.2), with grouped-query attention.
DEEPSEEK_FIXED = {"router_score": "sigmoid", "expert_bias": True}
DEEPSEEK_RENAMED = {
    "num_experts": ("n_routed_experts", "num_local_experts"), "num_shared_experts": ("n_shared_experts",)}
DEEPSEEK_ONLY: dict[str, tuple[Any, ...]] = {
    "n_group": (1,), "topk_group": (1,), "topk_method": ("noaux_tc",), "scoring_func": ("sigmoid", "noaux_tc"),
    "moe_layer_freq": (1,)}

FAMILIES = {
    "llama": Family("LlamaForCausalLM", DENSE, {**NO_EXPERTS, "qk_norm": "none"}, BIAS_ALL),
    "qwen2": Family(
        "Qwen2ForCausalLM", DENSE, {**NO_EXPERTS, "qk_norm": "none", "attention_bias": "qkv"},
        defaults={**WINDOW, "max_window_layers": 28}),
    "qwen3": Family(
        "Qwen3ForCausalLM", DENSE, {**NO_EXPERTS, "qk_norm": "head"}, BIAS_ALL,
        defaults={**WINDOW, "max_window_layers": 28, "head_dim": 128},
        ignored=("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "decoder_sparse_step")),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM", (*EXPERTS, "norm_topk_prob", "intermediate_size"), {"qk_norm": "head"}, BIAS_ALL,
        EXPERTS_RENAMED, defaults={**WINDOW, "norm_topk_prob": False, "intermediate_size": 0}, dense_key="mlp_only_layers"),
    "mixtral": Family(
        "MixtralForCausalLM", EXPERTS, {"qk_norm": "none", "norm_topk_prob": True},
        renamed={"num_experts": ("num_local_experts", "num_experts"), "moe_intermediate_size": ("intermediate_size",)},
        defaults={"rms_norm_eps": 1e-5, "rope_theta": 1e6}, only={"router_jitter_noise": (0.0,)},
        tensors={
            "blocks.{i}.mlp.router": (AT + "block_sparse_moe.gate.weight",),
            "blocks.{i}.mlp.gate_up_proj": tuple(f"{AT}block_sparse_moe.experts.{{e}}.{w}.weight" for w in ("w1", "w3")),
            "blocks.{i}.mlp.down_proj": (AT + "block_sparse_moe.experts.{e}.w2.weight",)}),
    "olmoe": Family(
        "OlmoeForCausalLM", (*EXPERTS, "norm_topk_prob"), {"qk_norm": "full"}, BIAS_ALL,
        {**EXPERTS_RENAMED, "moe_intermediate_size": ("intermediate_size",)},
        defaults={"rms_norm_eps": 1e-5, "norm_topk_prob": False}),
    "dots1": Family(
        "Dots1ForCausalLM", DEEPSEEK, {**DEEPSEEK_FIXED, "qk_norm": "head"}, BIAS_ALL, DEEPSEEK_RENAMED,
        defaults={"n_shared_experts": 0, "norm_topk_prob": False, "routed_scaling_factor": 1.0, "intermediate_size": 0,
                  "sliding_window": 4096, "max_window_layers": 62},
        only=DEEPSEEK_ONLY, dense_key="first_k_dense_replace", written={"sliding_window": None}),
    "glm4_moe": Family(
        "Glm4MoeForCausalLM", (*DEEPSEEK, "partial_rotary_factor"), DEEPSEEK_FIXED,
        {"attention_bias": ("attention_bias", "none", "qkv"), "qk_norm": ("use_qk_norm", "none", "head")}, DEEPSEEK_RENAMED,
        defaults={"rms_norm_eps": 1e-5, "norm_topk_prob": True, "routed_scaling_factor": 1.0, "n_shared_experts": 1,
                  "intermediate_size": 0, "first_k_dense_replace": 1, "partial_rotary_factor": 0.5},
        only=DEEPSEEK_ONLY, dense_key="first_k_dense_replace", written={"num_nextn_predict_layers": 0}),
}
