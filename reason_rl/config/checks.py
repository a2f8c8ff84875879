"""`check_config` raises `ConfigError` for a config that cannot run; `load_config` calls it before it returns.

Left out, because it needs more than the config: whether a task exists and has problems, whether a checkpoint
can be read, whether prompts fit the context.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from reason_rl.records import ConfigError

if TYPE_CHECKING:
    from reason_rl.config.schema import Config, ModelConfig


# The ranges, by dotted key.
POSITIVE = (
    "model.num_hidden_layers", "model.hidden_size", "model.num_attention_heads", "model.num_key_value_heads", "model.head_dim",
    "model.num_experts", "model.num_experts_per_tok", "model.moe_intermediate_size", "model.max_position_embeddings",
    "model.rope_theta",
    "model.rms_norm_eps", "model.routed_scaling_factor", "model.partial_rotary_factor",
    "pretrain.tokens_per_step", "optim.microbatch_tokens", "pretrain_optim.microbatch_tokens",
    "sampling.max_tokens", "rl.prompts_per_step", "rl.group_size", "rl.num_minibatches", "engine.max_num_seqs",
    "engine.prefill_tokens", "engine.cache_gib", "eval.problems", "eval.samples", "eval.final_problems", "eval.final_samples",
    "eval.temperature", "task.min_level", "pretrain.min_level", "run.keep_checkpoints", "sampling.top_p", "optim.lr",
    "optim.muon_lr", "optim.eps", "pretrain_optim.lr", "pretrain_optim.muon_lr", "pretrain_optim.eps",
    "reward.code_deadline_s", "reward.code_cpu_s", "reward.code_memory_mb", "reward.code_file_mb", "reward.code_output_kb",
    "reward.code_threads", "reward.custom_deadline_s", "reward.judge_deadline_s", "reward.judge_workers",
    "reward.model_deadline_s", "reward.math_deadline_s", "reward.workers", "reward.max_queued",
    "task.code_shown_tests",
)
NOT_NEGATIVE = (
    "run.num_threads", "run.checkpoint_every", "run.rollout_samples", "run.rollout_every", "model.num_shared_experts",
    "model.num_dense_layers", "model.intermediate_size", "pretrain.z_loss_coef",
    "pretrain.steps", "pretrain.balance_coef", "pretrain.expert_bias_rate", "rl.steps", "rl.dynamic_sampling",
    "rl.max_logprob_gap", "eval.every", "eval.pass_at_k", "engine.num_blocks", "reward.overlong_buffer", "run.seed",
    "engine.cuda_graph_batch",
    "task.max_prompt_tokens",
    "sampling.temperature", "sampling.top_k", "loss.constant_length", "optim.clip_norm", "optim.weight_decay",
    "optim.warmup_steps", "pretrain_optim.clip_norm", "pretrain_optim.weight_decay", "pretrain_optim.warmup_steps",
)
BETAS = ("optim.beta1", "optim.beta2", "pretrain_optim.beta1", "pretrain_optim.beta2")
SHARES = (
    "pretrain.direct_share", "pretrain.worked_share", "pretrain.fact_share", "pretrain.easy_worked_share",
    "pretrain.direct_noise", "task.heldout_share", "task.rl_share", "optim.final_lr_share",
    "task.min_pass_rate", "task.max_pass_rate", "pretrain_optim.final_lr_share", "sampling.top_p", "sampling.min_p",
    "model.partial_rotary_factor",
)


def check_config(config: Config) -> None:
    """Raises ConfigError for values out of range, and for keys that contradict each other."""
    # Each section by itself.
    _check_ranges(config)
    _check_names(config)
    _check_levels_and_shares(config)

    # Groups, minibatches and the model's sizes.
    rl, model, sampling, loss = config.rl, config.model, config.sampling, config.loss
    if rl.group_size < 2:
        raise ConfigError(f"rl.group_size must be at least 2 with rl.advantage={rl.advantage!r}, got {rl.group_size}: "
                          "an advantage compares the completions of a group")
    if rl.prompts_per_step * rl.group_size % rl.num_minibatches:
        raise ConfigError(f"rl.prompts_per_step * rl.group_size = {rl.prompts_per_step * rl.group_size} "
                          f"must be divisible by rl.num_minibatches = {rl.num_minibatches}")
    check_model(model)

    # Sampling: room for a prompt, and groups whose completions differ.
    if sampling.max_tokens >= model.max_position_embeddings and not model.init_from:
        raise ConfigError(f"sampling.max_tokens = {sampling.max_tokens} leaves no room for a prompt in "
                          f"model.max_position_embeddings = {model.max_position_embeddings}")
    if sampling.temperature <= 0 and rl.steps > 0:
        raise ConfigError(f"sampling.temperature must be above 0 for RL, got {sampling.temperature}: "
                          "greedy groups hold G equal completions")

    # run.exact, the decoder and CUDA graphs.
    if config.engine.decoder == "native" and config.run.exact == "off":
        raise ConfigError("engine.decoder='native' computes its own GEMMs, so it cannot go with run.exact='off'")
    if config.engine.cuda_graph_batch and config.run.exact == "off" and model.num_experts > 1:
        raise ConfigError(f"engine.cuda_graph_batch={config.engine.cuda_graph_batch} cannot go with run.exact='off' and experts: "
                          "torch's grouped GEMM reads the rows per expert back from the GPU, which cannot be captured")

    # Truncated sampling, and the overlong penalty.
    truncates = sampling.top_k or sampling.top_p < 1 or sampling.min_p > 0
    if truncates and loss.importance == "none":
        raise ConfigError("sampling.top_k/top_p/min_p needs loss.importance='tis' or 'icepop': ratios are taken over the "
                          "full softmax, which is not the truncated policy that sampled")
    if config.reward.overlong and not 0 < config.reward.overlong_buffer <= sampling.max_tokens:
        raise ConfigError(f"reward.overlong_buffer must be in 1..{sampling.max_tokens} (sampling.max_tokens) with "
                          f"reward.overlong = {config.reward.overlong}, got {config.reward.overlong_buffer}")


def check_model(model: ModelConfig) -> None:
    """Raises ConfigError for sizes that do not fit each other; a checkpoint's config.json is checked too."""
    # Heads, experts per token, and the dimensions that RoPE rotates.
    if model.num_attention_heads % model.num_key_value_heads:
        raise ConfigError(f"model.num_attention_heads = {model.num_attention_heads} must be divisible by "
                          f"model.num_key_value_heads = {model.num_key_value_heads}")
    if model.num_experts_per_tok > model.num_experts > 1:  # with 1 expert the layer is dense and the key is ignored
        raise ConfigError(f"model.num_experts_per_tok must be at most model.num_experts = {model.num_experts}, "
                          f"got {model.num_experts_per_tok}")
    if model.head_dim % 2:
        raise ConfigError(f"model.head_dim must be even (RoPE rotates pairs), got {model.head_dim}")
    rotary_dim = int(model.head_dim * model.partial_rotary_factor)
    if model.partial_rotary_factor > 1 or rotary_dim < 2 or rotary_dim % 2:
        raise ConfigError(f"model.partial_rotary_factor must leave an even number of the {model.head_dim} dimensions of a head, "
                          f"at least 2, got {model.partial_rotary_factor}: {rotary_dim}")

    # Dense layers.
    if model.num_dense_layers and model.num_experts == 1:
        raise ConfigError(f"model.num_dense_layers = {model.num_dense_layers} needs experts in the other layers; "
                          "with model.num_experts = 1 every layer is dense")
    if model.num_dense_layers >= model.num_hidden_layers:
        raise ConfigError(f"model.num_dense_layers must be below model.num_hidden_layers = {model.num_hidden_layers}, "
                          f"got {model.num_dense_layers}")
    if (model.num_experts == 1 or model.num_dense_layers) and not model.intermediate_size > 0:
        raise ConfigError("model.intermediate_size, the width of a dense MLP, must be above 0 with model.num_experts = "
                          f"{model.num_experts} and model.num_dense_layers = {model.num_dense_layers}, "
                          f"got {model.intermediate_size}")


def _check_names(config: Config) -> None:
    run = config.run
    if not run.name or run.name in (".", "..", "stages") or "/" in run.name:
        raise ConfigError(f"run.name must be the name of a folder in {run.out_dir}/, and not stages (all runs share that), "
                          f"got {run.name!r}")
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", run.device):
        raise ConfigError(f"run.device must be auto, cpu, cuda or cuda:<number>, got {run.device!r}")


def _check_levels_and_shares(config: Config) -> None:
    task, pretrain = config.task, config.pretrain
    if pretrain.direct_share + pretrain.worked_share > 1 + 1e-9:  # 1e-9: the sum of decimal shares may round to above 1
        raise ConfigError("pretrain.direct_share + pretrain.worked_share must be at most 1, got "
                          f"{pretrain.direct_share} + {pretrain.worked_share}")
    if task.heldout_share + task.rl_share >= 1:
        raise ConfigError("task.heldout_share + task.rl_share must leave problems for the corpus, got "
                          f"{task.heldout_share} + {task.rl_share}")
    if task.min_pass_rate > task.max_pass_rate:
        raise ConfigError(f"task.min_pass_rate = {task.min_pass_rate} is above task.max_pass_rate = {task.max_pass_rate}")
    if task.min_level > task.max_level:
        raise ConfigError(f"task.min_level = {task.min_level} is above task.max_level = {task.max_level}")
    if pretrain.min_level > task.max_level:
        raise ConfigError(f"pretrain.min_level = {pretrain.min_level} is above task.max_level = {task.max_level}")


def _check_ranges(config: Config) -> None:
    """Raises ConfigError for a value outside of its key's range."""
    def value(dotted: str) -> Any:
        section, key = dotted.split(".")
        return getattr(getattr(config, section), key)

    # Each condition is written so that NaN fails it.
    for dotted in POSITIVE:
        if not value(dotted) > 0:
            raise ConfigError(f"{dotted} must be above 0, got {value(dotted)}")
    for dotted in NOT_NEGATIVE:
        if not value(dotted) >= 0:
            raise ConfigError(f"{dotted} must be at least 0, got {value(dotted)}")
    for dotted in SHARES:
        if not 0 <= value(dotted) <= 1:
            raise ConfigError(f"{dotted} must be between 0 and 1, got {value(dotted)}")
    for dotted in BETAS:
        if not 0 <= value(dotted) < 1:
            raise ConfigError(f"{dotted} must be in [0, 1), got {value(dotted)}")
