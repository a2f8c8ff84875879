"""Hugging Face's model families as data: what each calls its tensors and its config keys, and which switches it has.

hf_config.py reads and writes config.json by these rows, weights.py the tensors; transformer.py knows none of them, only the
switches of ModelConfig. A new family is a new row, and in tests/reason_rl/test_families.py a tiny model to hold to transformers'.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

AT = "model.layers.{i}."

# Ours -> theirs; {i} is the layer, {e} the expert. Several names cut our matrix along its rows: q above k above v, gate above up.
TENSORS: dict[str, tuple[str, ...]] = {
    "embedding.weight": ("model.embed_tokens.weight",),
    "norm.weight": ("model.norm.weight",),
    "head.weight": ("lm_head.weight",),
    "blocks.{i}.attention_norm.weight": (AT + "input_layernorm.weight",),
    "blocks.{i}.mlp_norm.weight": (AT + "post_attention_layernorm.weight",),
    "blocks.{i}.attention.qkv.weight": tuple(f"{AT}self_attn.{p}_proj.weight" for p in "qkv"),
    "blocks.{i}.attention.qkv.bias": tuple(f"{AT}self_attn.{p}_proj.bias" for p in "qkv"),
    "blocks.{i}.attention.out.weight": (AT + "self_attn.o_proj.weight",),
    "blocks.{i}.attention.out.bias": (AT + "self_attn.o_proj.bias",),
    "blocks.{i}.attention.q_norm.weight": (AT + "self_attn.q_norm.weight",),
    "blocks.{i}.attention.k_norm.weight": (AT + "self_attn.k_norm.weight",),
    "blocks.{i}.mlp.gate_up.weight": (AT + "mlp.gate_proj.weight", AT + "mlp.up_proj.weight"),
    "blocks.{i}.mlp.down.weight": (AT + "mlp.down_proj.weight",),
    "blocks.{i}.mlp.router": (AT + "mlp.gate.weight",),
    "blocks.{i}.mlp.expert_bias": (AT + "mlp.gate.e_score_correction_bias",),
    "blocks.{i}.mlp.gate_up": (AT + "mlp.experts.{e}.gate_proj.weight", AT + "mlp.experts.{e}.up_proj.weight"),
    "blocks.{i}.mlp.down": (AT + "mlp.experts.{e}.down_proj.weight",),
    "blocks.{i}.mlp.shared.gate_up.weight": (AT + "mlp.shared_experts.gate_proj.weight", AT + "mlp.shared_experts.up_proj.weight"),
    "blocks.{i}.mlp.shared.down.weight": (AT + "mlp.shared_experts.down_proj.weight",),
}
# In old Llama files: worked out from the config, not learned.
DERIVED_TENSORS = ("rotary_emb.inv_freq",)

# ModelConfig field -> its key, and other spellings of it (transformers 5 renamed some).
KEYS: dict[str, tuple[str, ...]] = {
    "num_hidden_layers": ("num_hidden_layers",), "hidden_size": ("hidden_size",), "num_attention_heads": ("num_attention_heads",),
    "num_key_value_heads": ("num_key_value_heads",), "head_dim": ("head_dim",), "tie_word_embeddings": ("tie_word_embeddings",),
    "rms_norm_eps": ("rms_norm_eps",), "max_position_embeddings": ("max_position_embeddings",),
}
# What a missing key means, where it may be missing: a value, or what makes one of the other keys.
DEFAULTS: dict[str, Any] = {
    "tie_word_embeddings": False, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "num_key_value_heads": lambda values: values["num_attention_heads"],
    "head_dim": lambda values: values["hidden_size"] // values["num_attention_heads"]}
# Keys that take one value here (missing or null is that value too): any other is maths that the model does not have.
ONLY: dict[str, tuple[Any, ...]] = {"hidden_act": ("silu", "swish"), "attention_dropout": (0.0,), "mlp_bias": (False,)}
# Keys with these words are refused by them in every family.
REFUSED = {
    "kv_lora_rank": "multi-head latent attention (MLA)", "q_lora_rank": "multi-head latent attention (MLA)",
    "quantization_config": "quantised weights", "attn_logit_softcapping": "capped attention logits",
    "final_logit_softcapping": "capped logits", "attention_chunk_size": "chunked attention",
    "no_rope_layers": "layers without RoPE", "clip_qkv": "clipped queries, keys and values",
    "logit_scale": "scaled logits", "auto_map": "a model with code of its own",
}
# Keys that change nothing in a model's maths: training, generation, bookkeeping.
HARMLESS = frozenset((
    "architectures", "model_type", "vocab_size", "reason_rl", "transformers_version", "torch_dtype", "dtype", "name_or_path",
    "initializer_range", "use_cache", "pretraining_tp", "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id",
    "tokenizer_class", "return_dict", "chunk_size_feed_forward", "id2label", "label2id", "problem_type", "output_router_logits",
    "router_aux_loss_coef", "aux_loss_alpha", "seq_aux", "ep_size", "attn_implementation", "unsloth_fixed", "unsloth_version",
    "is_llama_config", "transformers.js_config", "num_nextn_predict_layers"))


@dataclass(frozen=True)
class Family:
    architecture: str
    """The class that transformers builds."""
    keys: Mapping[str, tuple[str, ...]]
    """As KEYS, beside them."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """ModelConfig fields that are the same in the whole family."""
    switches: Mapping[str, tuple[str, str, str]] = field(default_factory=dict)
    """ModelConfig field -> (a key that is true or false, the field's value where false or missing, where true)."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """As DEFAULTS, before them."""
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """As ONLY, beside them."""
    dense_key: str = ""
    """Where it says which layers are dense among layers with experts."""
    has_rotary_share: bool = False
    """Reads partial_rotary_factor."""
    ignored: tuple[str, ...] = ()
    """Keys that its models do not read."""
    written: Mapping[str, Any] = field(default_factory=dict)
    """What config.json must say beside the keys above."""
    tensors: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """As TENSORS, before them."""

    def all_keys(self) -> dict[str, tuple[str, ...]]:
        return {**KEYS, **self.keys}

    def default(self, key: str) -> Any:
        return self.defaults.get(key, DEFAULTS.get(key))


DENSE = {"num_experts": 1, "num_experts_per_tok": 1}
DENSE_KEYS = {"moe_intermediate_size": ("intermediate_size",)}
BIAS_ALL = {"attention_bias": ("attention_bias", "none", "all")}
WINDOW = {"use_sliding_window": False, "sliding_window": 4096}
# The routing of DeepSeek-V3 (arXiv:2412.19437, 2.1.2), with grouped-query attention.
DEEPSEEK_KEYS = {
    "num_experts": ("n_routed_experts", "num_local_experts"), "num_experts_per_tok": ("num_experts_per_tok",),
    "moe_intermediate_size": ("moe_intermediate_size",), "num_shared_experts": ("n_shared_experts",), "norm_topk_prob": ("norm_topk_prob",),
    "routed_scaling_factor": ("routed_scaling_factor",), "intermediate_size": ("intermediate_size",)}
DEEPSEEK_FIXED = {"router_score": "sigmoid", "expert_bias": True}
DEEPSEEK_ONLY: dict[str, tuple[Any, ...]] = {
    "n_group": (1,), "topk_group": (1,), "topk_method": ("noaux_tc",), "scoring_func": ("sigmoid", "noaux_tc"),
    "moe_layer_freq": (1,)}

FAMILIES = {
    "llama": Family("LlamaForCausalLM", DENSE_KEYS, {**DENSE, "qk_norm": "none"}, BIAS_ALL),
    "qwen2": Family("Qwen2ForCausalLM", DENSE_KEYS, {**DENSE, "qk_norm": "none", "attention_bias": "qkv"},
                    defaults={**WINDOW, "max_window_layers": 28}),
    "qwen3": Family("Qwen3ForCausalLM", DENSE_KEYS, {**DENSE, "qk_norm": "head"}, BIAS_ALL,
                    defaults={**WINDOW, "max_window_layers": 28, "head_dim": 128},
                    ignored=("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob",
                             "decoder_sparse_step")),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        {"num_experts": ("num_experts", "num_local_experts"), "num_experts_per_tok": ("num_experts_per_tok",),
         "moe_intermediate_size": ("moe_intermediate_size",), "norm_topk_prob": ("norm_topk_prob",), "intermediate_size": ("intermediate_size",)},
        {"qk_norm": "head"}, BIAS_ALL, defaults={**WINDOW, "norm_topk_prob": False},
        dense_key="mlp_only_layers"),
    "mixtral": Family(
        "MixtralForCausalLM",
        {"num_experts": ("num_local_experts", "num_experts"), "num_experts_per_tok": ("num_experts_per_tok",), **DENSE_KEYS},
        {"qk_norm": "none", "norm_topk_prob": True}, defaults={"rms_norm_eps": 1e-5, "rope_theta": 1e6},
        only={"router_jitter_noise": (0.0,)},
        tensors={
            "blocks.{i}.mlp.router": (AT + "block_sparse_moe.gate.weight",),
            "blocks.{i}.mlp.gate_up": tuple(f"{AT}block_sparse_moe.experts.{{e}}.{w}.weight" for w in ("w1", "w3")),
            "blocks.{i}.mlp.down": (AT + "block_sparse_moe.experts.{e}.w2.weight",)}),
    "olmoe": Family(
        "OlmoeForCausalLM",
        {"num_experts": ("num_experts", "num_local_experts"), "num_experts_per_tok": ("num_experts_per_tok",),
         "norm_topk_prob": ("norm_topk_prob",), **DENSE_KEYS},
        {"qk_norm": "full"}, BIAS_ALL, defaults={"rms_norm_eps": 1e-5, "norm_topk_prob": False}),
    "dots1": Family(
        "Dots1ForCausalLM", DEEPSEEK_KEYS, {**DEEPSEEK_FIXED, "qk_norm": "head"}, BIAS_ALL,
        defaults={"n_shared_experts": 0, "norm_topk_prob": False, "routed_scaling_factor": 1.0, "sliding_window": 4096,
                  "max_window_layers": 62},
        only=DEEPSEEK_ONLY, dense_key="first_k_dense_replace", written={"sliding_window": None}),
    "glm4_moe": Family(
        "Glm4MoeForCausalLM", DEEPSEEK_KEYS, DEEPSEEK_FIXED,
        {"attention_bias": ("attention_bias", "none", "qkv"), "qk_norm": ("use_qk_norm", "none", "head")},
        defaults={"rms_norm_eps": 1e-5, "norm_topk_prob": True, "routed_scaling_factor": 1.0, "n_shared_experts": 1,
                  "first_k_dense_replace": 1, "partial_rotary_factor": 0.5},
        only=DEEPSEEK_ONLY, dense_key="first_k_dense_replace", has_rotary_share=True, written={"num_nextn_predict_layers": 0}),
}
