"""The sections of a run's configuration. `train.py --help` prints the docstrings of their fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from kernels.grpo_loss.spec import LossSpec
from reason_rl.config.reward import RewardConfig
from reason_rl.config.task import TaskConfig
from reason_rl.records import SamplingParams


@dataclass(frozen=True)
class RunConfig:
    name: str = "program"
    """The run's folder is out_dir/name."""
    out_dir: str = "runs"
    """The folder of all runs. Outputs of stages are in out_dir/stages; runs with equal stages share them."""
    seed: int = 0
    """Seeds every random draw of the run: weights, corpus, problems, sampling."""
    device: str = "auto"
    """"auto" (cuda if available, else cpu), "cpu", "cuda" or "cuda:1"."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype; master weights are float32. "auto": bfloat16 on CUDA, and on a CPU with AVX-512-BF16 if
    the native kernels are built; else float32."""
    exact: Literal["auto", "on", "off"] = "auto"
    """Whether the sampler's logprobs equal the trainer's bit for bit. "auto": batch-invariant ops on devices
    that have them; each step logs the gap. "on": also stop if the gap on policy is not 0. "off": torch's
    GEMMs in projections, experts and the trainer's head; their rounding may depend on the batch."""
    num_threads: int = 0
    """torch's CPU threads in each process. 0 divides the cores equally among the machine's processes; a
    single process uses OMP_NUM_THREADS if it is set."""
    resume: Literal["auto", "never"] = "auto"
    """"auto" continues an unfinished run of the same config; "never" starts over in a new folder, name-2,
    name-3, ..."""
    checkpoint_every: int = 20
    """RL steps between checkpoints; 0: only timed ones. A checkpoint is also due 300 s after the last one."""
    keep_checkpoints: int = 2
    """Newest step checkpoints that are kept for each stage."""
    rollout_samples: int = 8
    """Groups written to rollouts/ at each step that writes them; the report shows them."""
    rollout_every: int = 10
    """RL steps between writes of sampled rollouts; the first and the last step always write them."""
    tensorboard: bool = True
    """Also log to TensorBoard event files in the run's folder."""
    wandb_project: str = ""
    """Also log to this Weights & Biases project; needs `pip install wandb`. Empty: off."""


@dataclass(frozen=True)
class ModelConfig:
    init_from: str = ""
    """A Hugging Face checkpoint folder to start RL from; the keys below then have no effect. Empty: a model
    of the shape below is pretrained first."""
    family: Literal["auto", "llama", "qwen2", "qwen3", "qwen3_moe", "mixtral", "olmoe", "dots1", "glm4_moe"] = "auto"
    """Hugging Face's model_type of written checkpoints. "auto": qwen3_moe, or qwen3 if num_experts is 1."""
    num_hidden_layers: int = 3
    hidden_size: int = 128
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    """Must divide num_attention_heads."""
    head_dim: int = 32
    attention_bias: Literal["none", "qkv", "all"] = "none"
    """Attention projections with a bias: none, q, k and v, or these and the output projection."""
    qk_norm: Literal["none", "head", "full"] = "head"
    """RMSNorm of q and k: over each head's dimensions, or over the dimensions of all heads together."""
    num_experts: int = 8
    """Routed experts of a MoE layer; 1 makes every layer dense."""
    num_experts_per_tok: int = 2
    """Routed experts of each token. Ignored if dense."""
    moe_intermediate_size: int = 96
    """Width of one expert. Ignored if dense."""
    num_shared_experts: int = 0
    """Experts of a MoE layer that process every token, in addition to its routed experts."""
    router_score: Literal["softmax", "sigmoid"] = "softmax"
    """Function from router logits to expert scores."""
    norm_topk_prob: bool = True
    """Normalise the weights of a token's chosen experts to a sum of 1."""
    routed_scaling_factor: float = 1.0
    """Factor on the weights of the chosen experts, after the normalisation."""
    expert_bias: bool = False
    """Load balancing without a loss (arXiv:2408.15664): a bias per expert, used only to choose experts.
    Pretraining moves it against the expert's load."""
    num_dense_layers: int = 0
    """The first num_dense_layers layers have one MLP instead of experts."""
    intermediate_size: int = 0
    """Width of a dense layer's MLP."""
    tie_word_embeddings: bool = True
    """The LM head uses the embedding's weights."""
    rope_theta: float = 10000.0
    """Base of RoPE's frequencies."""
    partial_rotary_factor: float = 1.0
    """Share of a head's dimensions, counted from the first, that RoPE rotates."""
    rope_scaling: str = ""
    """Hugging Face's rope_scaling table as JSON (linear, dynamic, yarn or llama3); empty: no scaling."""
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 256
    """Context length in tokens, prompt and completion together."""


@dataclass(frozen=True)
class PretrainConfig:
    """The base model: next-token prediction on a synthetic corpus, mostly of answers without a thought."""

    tokenizer: Literal["char", "byte"] = "char"
    """"char": a token for each of the 52 characters of our tasks. "byte": a token per byte, for any text."""
    steps: int = 1200
    """Optimizer updates."""
    tokens_per_step: int = 2048
    """Most tokens of one update, in whole documents."""
    direct_share: float = 0.82
    """Share of problem documents that have an empty thought, at levels from task.min_level up."""
    worked_share: float = 0.09
    """Share of problem documents with the whole work as the thought, at the same levels. In the remaining
    ones the thought stops after a random line."""
    fact_share: float = 0.2
    """Share of all documents that are single facts (`7*3=1`); the others are problem documents."""
    min_level: int = 1
    """Smallest level of problems in the corpus; it may be below task.min_level."""
    easy_worked_share: float = 0.4
    """Replaces worked_share at levels below task.min_level; direct documents are reduced by as many."""
    direct_noise: float = 0.0
    """Share of documents with an empty thought whose answer is wrong."""
    balance_coef: float = 0.0
    """Coefficient of the load-balance loss (Switch, arXiv:2101.03961)."""
    z_loss_coef: float = 0.0
    """Coefficient of the router z-loss, which keeps router logits small (ST-MoE, arXiv:2202.08906)."""
    expert_bias_rate: float = 0.0001
    """Change of an expert's bias per update (model.expert_bias). With 8 experts, 0.001 slowed learning."""


@dataclass(frozen=True)
class OptimConfig:
    name: Literal["adamw", "muon"] = "adamw"
    """"muon": torch.optim.Muon on matrices of attention, MLPs and experts, AdamW on embedding, router, norms,
    biases and head."""
    lr: float = 3e-4
    """Peak learning rate of AdamW."""
    muon_lr: float = 0.02
    """Peak learning rate of Muon."""
    beta1: float = 0.9
    """AdamW's."""
    beta2: float = 0.99
    """AdamW's."""
    eps: float = 1e-8
    """AdamW's."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices; embedding, norms and biases have none."""
    clip_norm: float = 1.0
    """Largest L2 norm of the gradient over all parameters; 0 turns clipping off."""
    warmup_steps: int = 0
    """Steps of linear warm-up to the peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After warm-up; the decays reach final_lr_share of the peak one step after the last."""
    final_lr_share: float = 0.0
    """End of the decay as a share of the peak learning rate."""
    microbatch_tokens: int = 16384
    """Most packed tokens in one forward pass; a step with more accumulates gradients."""


@dataclass(frozen=True)
class EngineConfig:
    max_num_seqs: int = 256
    """Most sequences that one process decodes at a time."""
    num_blocks: int = 0
    """KV cache blocks of 16 tokens. 0: enough for max_num_seqs sequences of the longest prompt and
    sampling.max_tokens, at most cache_gib."""
    cache_gib: float = 16.0
    """Most GiB of KV cache if num_blocks is 0; it always fits one sequence. If blocks run out, sequences wait
    and the youngest are preempted: slower, but the same tokens."""
    prefill_tokens: int = 8192
    """Most tokens in one prefill pass; a longer prompt has a pass to itself."""
    decoder: Literal["auto", "native", "ops"] = "auto"
    """"native": one C++ call runs the whole model for several tokens. "ops": one token per pass, op by op.
    Both draw the same tokens. "auto": native if it supports the model and the device."""
    cuda_graph_batch: int = 0
    """On CUDA, decode steps of up to this many sequences run as CUDA graphs, padded to a power of two: the
    same tokens. 0: no graphs."""


@dataclass(frozen=True)
class RLConfig:
    steps: int = 80
    """Batches of rollouts; each has num_minibatches optimizer updates."""
    prompts_per_step: int = 16
    """Problems per step, over all processes."""
    group_size: int = 16
    """Completions per problem, G; at least 2."""
    num_minibatches: int = 2
    """Optimizer updates per step; the step's completions are divided equally among them."""
    advantage: Literal["std", "mean", "leave_one_out", "batch_std"] = "std"
    """"std": (r - mean) / std of the group (GRPO). "mean": r - mean (Dr. GRPO). "leave_one_out": r - mean of
    the others (RLOO). "batch_std": (r - group mean) / std of the batch."""
    drop_no_signal: bool = True
    """Leave groups with equal rewards out of the update. Their advantages are 0: they only add tokens to the
    loss's denominator, and KL terms if loss.kl_coef is above 0."""
    dynamic_sampling: int = 0
    """DAPO: most further rounds of new problems per step, which replace groups with equal rewards. 0: off."""
    drop_truncated: bool = False
    """DAPO's overlong filtering: leave completions that were cut at max_tokens out of the update."""
    old_logprobs: Literal["rollout", "recompute"] = "rollout"
    """Source of old_logprobs. "rollout": the engine's record, which equals the trainer's logprobs with
    batch-invariant ops. "recompute": a forward pass before the step's first update."""
    max_logprob_gap: float = 0.0
    """Above 0: stop if the engine's and the trainer's logprobs differ by more than this (nats) on policy. 0:
    never stop; metric max_abs_logprob_gap has the gap, and the first one above 0.001 (0 on a CPU) prints a
    warning. run.exact = "on" stops at any gap."""
    routing_replay: bool = False
    """Train with the experts that the sampler chose, with weights from the trainer's router
    (arXiv:2507.18071, 5.3): for samplers whose routing may differ."""


@dataclass(frozen=True)
class EvalConfig:
    every: int = 10
    """RL steps between evaluations; 0: only before the first and after the last step."""
    problems: int = 100
    """Held-out problems of evaluations between the first and the last, and of pass@k."""
    samples: int = 2
    """Completions per problem of evaluations between the first and the last."""
    final_problems: int = 500
    """Held-out problems of the first and the last evaluation."""
    final_samples: int = 4
    """Completions per problem of the first and the last evaluation."""
    pass_at_k: int = 16
    """Completions per problem for pass@k, at the first and the last evaluation; 0: no pass@k."""
    temperature: float = 1.0
    """Sampling temperature of evaluations; they do not use top_k, top_p and min_p."""


@dataclass(frozen=True)
class StageConfig:
    """A [[stage]] of a recipe: its kind, the stage that it starts from, and keys that override the recipe's.

        [[stage]]
        kind = "grpo"
        name = "reasoning"
        [stage.rl]
        steps = 40
    """

    kind: str
    """pretrain or grpo: a key of STAGES in reason_rl/stages."""
    name: str
    """Unique in the recipe; default: the kind."""
    after: str = ""
    """The stage whose output this one starts from; empty: the stage before it."""
    sections: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """section -> key -> value, for this stage only."""


@dataclass(frozen=True)
class Config:
    """A recipe: its stages, and the sections that apply to all of them. Without stages: pretrain, then grpo;
    only grpo if model.init_from names a checkpoint."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    pretrain_optim: OptimConfig = field(default_factory=lambda: OptimConfig(
        name="muon", lr=2e-3, schedule="linear", warmup_steps=20, beta2=0.95))
    rl: RLConfig = field(default_factory=RLConfig)
    loss: LossSpec = field(default_factory=lambda: LossSpec(clip_high=0.28))
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=2e-4, schedule="linear", final_lr_share=0.1))
    sampling: SamplingParams = field(default_factory=SamplingParams)
    engine: EngineConfig = field(default_factory=EngineConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    stages: tuple[StageConfig, ...] = field(default=(), metadata={"is_section": False})
