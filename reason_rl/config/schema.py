"""The sections of a run's configuration: frozen dataclasses with a docstring under each field."""

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
    seed: int = 0
    """Keys every random draw of the run: weights, corpus, problems, sampling."""
    device: str = "auto"
    """"auto" (cuda where there is one, else cpu), "cpu", "cuda" or "cuda:1"."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype; master weights stay float32. "auto": bfloat16 on CUDA, and on a CPU whose bf16 products are twice as fast
    (AVX-512-BF16, with the native kernels built); float32 elsewhere."""
    exact: Literal["auto", "on", "off"] = "auto"
    """Whether the sampler's logprobs are the trainer's to the bit. "auto": wherever the ops are batch-invariant; the gap is logged
    at every step. "on": the run stops where the gap on policy is not 0. "off": projections, experts and the trainer's head by
    torch's own GEMMs, which may round a row by the batch it stands in."""
    num_threads: int = 0
    """CPU threads of torch in each process; 0 shares the machine's cores among the processes (a single process goes by
    OMP_NUM_THREADS where that is set)."""
    resume: Literal["auto", "never"] = "auto"
    """"auto" continues an unfinished run of the same config; "never" starts afresh in a new folder."""
    checkpoint_every: int = 20
    """RL steps between checkpoints; 0 keeps only the one at the end."""
    keep_checkpoints: int = 2
    """How many step checkpoints to keep, the newest ones."""
    rollout_samples: int = 8
    """Groups written to rollouts/ at each logged step, for the report's viewer."""
    rollout_every: int = 10
    """RL steps between two writes of sampled rollouts."""
    tensorboard: bool = True
    wandb_project: str = ""
    """Log to this Weights & Biases project too; needs `pip install wandb`."""


@dataclass(frozen=True)
class ModelConfig:
    init_from: str = ""
    """A checkpoint folder to start RL from; empty builds and pretrains the model below."""
    family: Literal["auto", "llama", "qwen2", "qwen3", "qwen3_moe", "mixtral", "olmoe", "dots1", "glm4_moe"] = "auto"
    """Whose names and keys checkpoints are written in (Hugging Face's model_type). "auto": qwen3_moe, or qwen3 without experts."""
    num_hidden_layers: int = 3
    hidden_size: int = 128
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    attention_bias: Literal["none", "qkv", "all"] = "none"
    """Which projections of attention have a bias: none, q, k and v, or the output too."""
    qk_norm: Literal["none", "head", "full"] = "head"
    """RMSNorm of q and k: each head by itself, or all heads as one row."""
    num_experts: int = 8
    """1 makes every layer dense."""
    num_experts_per_tok: int = 2
    """Ignored when dense."""
    moe_intermediate_size: int = 96
    """Width of one expert. Ignored when dense."""
    num_shared_experts: int = 0
    """Experts that every token goes through, beside the routed ones."""
    router_score: Literal["softmax", "sigmoid"] = "softmax"
    norm_topk_prob: bool = True
    """Make the k chosen weights sum to one."""
    routed_scaling_factor: float = 1.0
    """Times the chosen weights, after that."""
    expert_bias: bool = False
    """Aux-loss-free balancing (arXiv:2408.15664): a bias per expert, in the choice only, nudged against its load."""
    num_dense_layers: int = 0
    """The first so many layers have one MLP in place of the experts."""
    intermediate_size: int = 0
    """Width of a dense layer's MLP."""
    tie_word_embeddings: bool = True
    rope_theta: float = 10000.0
    partial_rotary_factor: float = 1.0
    """The share of a head's dimensions that is turned by its position, the first ones."""
    rope_scaling: str = ""
    """Hugging Face's rope_scaling table as JSON (linear, dynamic, yarn or llama3); empty: the angles as they are."""
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 256
    """Context: prompt plus completion must fit."""


@dataclass(frozen=True)
class PretrainConfig:
    """The base model: next-token prediction on a synthetic corpus, most problems answered straight away."""

    tokenizer: Literal["char", "byte"] = "char"
    """"char": a token for each of the 52 characters that our own tasks are written in. "byte": a token a byte, for any text."""
    steps: int = 1200
    tokens_per_step: int = 2048
    direct_share: float = 0.82
    """Documents that answer at once."""
    worked_share: float = 0.09
    """Documents with all of the work between the tags; the rest work up to a random line, then answer."""
    fact_share: float = 0.2
    """Documents that are single facts (`7*3=1`), taken first; the three kinds above share what is left."""
    min_level: int = 1
    """The corpus also holds easier problems than RL's, from this level on."""
    easy_worked_share: float = 0.4
    """Worked share among the problems below the task's min_level."""
    direct_noise: float = 0.0
    """Share of direct answers that are wrong (a guesser's corpus)."""
    balance_coef: float = 0.0
    """Weight of the classic load-balance loss (Switch, arXiv:2101.03961)."""
    z_loss_coef: float = 0.0
    """Weight of the router z-loss, which keeps its logits small (ST-MoE, arXiv:2202.08906)."""
    expert_bias_rate: float = 0.0001
    """Step of the expert bias per update, where model.expert_bias is on. At 8 experts 0.001
    was seen to slow learning."""


@dataclass(frozen=True)
class OptimConfig:
    name: Literal["adamw", "muon"] = "adamw"
    """"muon": torch's own Muon on the hidden matrices, AdamW on embeddings, router, norms and head."""
    lr: float = 3e-4
    """Peak learning rate of AdamW."""
    muon_lr: float = 0.02
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.0
    """On matrices; norms, biases and the embedding have none."""
    clip_norm: float = 1.0
    """Largest gradient norm, over all parameters; 0 leaves it out."""
    warmup_steps: int = 0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up: down towards final_lr_share of the peak, which the step after the last would have."""
    final_lr_share: float = 0.0
    microbatch_tokens: int = 16384
    """Most packed tokens in one forward pass; a longer step accumulates gradients."""


@dataclass(frozen=True)
class EngineConfig:
    max_num_seqs: int = 256
    """Sequences decoded together."""
    num_blocks: int = 0
    """KV blocks of 16 tokens; 0 allots what max_num_seqs sequences of the longest prompt and sampling.max_tokens need (the model's
    own context plays no part), but no more than cache_gib."""
    cache_gib: float = 16.0
    """Most memory of the KV cache where num_blocks is 0; one sequence always has room. Where more is needed, sequences wait and the
    youngest give way: slower, but the same tokens."""
    prefill_tokens: int = 8192
    """Most tokens in one prefill pass."""
    decoder: Literal["auto", "native", "ops"] = "auto"
    """"native": several tokens a call, the whole model in it. "ops": one token a call, op by op through the model. Both draw the
    same tokens. "auto": native where it can be."""
    cuda_graph_batch: int = 0
    """On CUDA, decode steps of up to this many sequences are captured as CUDA graphs, each padded to a power of two: the same
    tokens. 0 captures none."""


@dataclass(frozen=True)
class RLConfig:
    steps: int = 80
    prompts_per_step: int = 16
    group_size: int = 16
    num_minibatches: int = 2
    """Optimizer updates on each batch of rollouts; the sequences are split evenly between them."""
    advantage: Literal["std", "mean", "leave_one_out", "batch_std"] = "std"
    """"std": (r - mean) / std of the group (GRPO). "mean": r - mean (Dr. GRPO). "leave_one_out": r - mean of the others
    (RLOO). "batch_std": r - group mean, over the std of the batch."""
    drop_no_signal: bool = True
    """Leave groups of equal rewards out of the update (they would add nothing but tokens to the denominator)."""
    dynamic_sampling: int = 0
    """DAPO: further rounds of fresh problems, at most this many a step, to replace groups without signal."""
    drop_truncated: bool = False
    """DAPO's overlong filtering: completions cut at max_tokens take no part in the update."""
    old_logprobs: Literal["rollout", "recompute"] = "rollout"
    """Where old_logprobs come from: the engine's own record (equal to the trainer's, so no second forward is needed),
    or a forward before the first update."""
    max_logprob_gap: float = 0.0
    """Above 0: stop when the engine's logprobs leave the trainer's by more than this (nats) on policy. 0 goes on: the gap is
    logged as max_abs_logprob_gap, with one warning where it is more than 0.001. run.exact = "on" allows none."""
    routing_replay: bool = False
    """Train with the experts that the sampler chose, their weights from the trainer's own router (arXiv:2507.18071, 5.3): for
    samplers whose routes may differ."""


@dataclass(frozen=True)
class EvalConfig:
    every: int = 10
    """RL steps between evaluations on a part of the held-out problems; 0 leaves only the first and the last."""
    problems: int = 100
    """Held-out problems of the evaluations along the way."""
    samples: int = 2
    final_problems: int = 500
    """Held-out problems of the first and the last evaluation."""
    final_samples: int = 4
    pass_at_k: int = 16
    """Samples for pass@k of base and final policy on `problems` problems; 0 leaves it out."""
    temperature: float = 1.0


@dataclass(frozen=True)
class StageConfig:
    """A [[stage]] of a recipe: what runs, from which weights, and the keys in which it differs from the recipe's sections.

        [[stage]]
        kind = "grpo"
        name = "reasoning"
        [stage.rl]
        steps = 40
    """

    kind: str
    """The kind of stage: pretrain, grpo, ... (reason_rl/stages)."""
    name: str
    """Unique in the recipe; the kind where it is left out."""
    after: str = ""
    """The stage whose output this one starts from; the stage before it where left out."""
    sections: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """section -> key -> value, for this stage alone."""


@dataclass(frozen=True)
class Config:
    """A recipe: sections that hold for all stages, and the stages. Without stages: pretrain, then grpo; or grpo alone where
    model.init_from names a checkpoint."""

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
