"""The dataclasses that the packages of reason_rl, its "rooms", pass to each other.

A GRPO step passes them on in this order: `Problem` (data) -> `Group` of `Completion`s (engine) -> `Score`
(reward) -> `Microbatch` (rl) -> `StepStats` (stages). They hold facts, so they are frozen; code that computes
is in the rooms.

Letters: B prompts, G group size, S segments, T packed tokens, N loss tokens, V vocabulary, P prompt tokens, n
completion tokens, M layers with experts, k experts per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # for annotations alone: a verifier's worker imports `Problem` and must start without torch
    import torch

class ConfigError(ValueError):
    """A config, or a file of the user's, that cannot be used. The message names the key or file, and expected and actual.

    A command turns it into one line; every other error keeps its traceback.
    """


FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Problem:
    """One problem of a task: the prompt for the policy, and the facts for the verifier.

    Problem(7, "countdown", "Make 10 from 9, 8 and 7.", (31, 4, ...), answer="9+8-7",
            facts={"numbers": [9, 8, 7], "target": 10}, level=3)
    """

    problem_id: int
    """Non-negative and the same in every run: it keys the sampler's noise."""
    task: str
    prompt: str
    """The full text given to the policy, template included."""
    prompt_ids: tuple[int, ...]
    """`prompt` as tokens."""
    answer: str
    """The right answer, or one example where many are right (countdown)."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Further input of the verifier; for countdown the numbers and the target."""
    level: int = 0
    """Difficulty in the task's own unit: lines of a program, numbers of a countdown."""
    completion_prefix: str = ""
    """The end of the prompt that verifiers read as the start of the completion, such as "<think>"."""


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn: the [sampling] section of a config, and the engine's argument.

    SamplingParams(temperature=0.6, top_p=0.95, max_tokens=512, stop_ids=(1,))
    """

    temperature: float = 1.0
    """0 is greedy. RL needs more than 0: the completions of a group must differ."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of likeliest tokens whose mass reaches top_p."""
    min_p: float = 0.0
    """Drop tokens less likely than min_p times the likeliest."""
    max_tokens: int = 80
    """Longest completion, stop token included."""
    stop_ids: tuple[int, ...] = field(default=(), metadata={"is_key": False})
    """Tokens that end a completion. Not a config key: they come from the tokenizer."""

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ConfigError(f"sampling.temperature must be at least 0, got {self.temperature}")
        if self.top_k < 0:
            raise ConfigError(f"sampling.top_k must be at least 0 (0 keeps all), got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"sampling.top_p must be in (0, 1], got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"sampling.min_p must be in [0, 1], got {self.min_p}")
        if self.max_tokens < 1:
            raise ConfigError(f"sampling.max_tokens must be at least 1, got {self.max_tokens}")


@dataclass(frozen=True)
class Completion:
    """The tokens after one prompt, exactly as sampled: they are never tokenised again.

    A completion of 4 tokens, of which the third is a tool's result (for the policy it is context):
        token_ids       (12, 40, 77, 1)
        logprobs        (-0.3, -1.2, 0.0, -0.1)
        kept_logmass    (0.0, -0.05, 0.0, 0.0)          token 40 was drawn from 95% of the mass
        token_mask      (True, True, False, True)
        finish_reason   "stop"                          token 1 is a stop id
    """

    token_ids: tuple[int, ...]
    """Stop token included."""
    logprobs: tuple[float, ...]
    """Per token, in nats: log of the full softmax at the rollout temperature."""
    kept_logmass: tuple[float, ...]
    """Per token: log of the mass that truncation (top-k, top-p, min-p) kept; 0.0 without truncation.
    The truncated policy's logprob is `logprobs - kept_logmass`."""
    finish_reason: FinishReason
    policy_version: int
    """Optimizer steps of the weights that sampled it."""
    sample_index: int
    """0..G-1 within the group; part of the noise key."""
    routed_expert_ids: torch.Tensor | None = field(default=None, compare=False)
    """i32[n - 1, M, k], if recorded: the experts of each token but the last, which no forward processed."""
    token_mask: tuple[bool, ...] | None = None
    """Per token: sampled by the policy, or (False) inserted, such as a tool's result. None: all sampled."""


@dataclass(frozen=True)
class Score:
    """The verifiers' result for one completion.

    Score(1.1, {"accuracy": 1.0, "format": 1.0}) with weights 1.0 and 0.1; or
    Score(0.0, {}, is_graded=False, cause="accuracy raised: KeyError: 'target'")
    """

    value: float
    """The weighted sum of the parts; advantages are computed from it."""
    parts: Mapping[str, float]
    """Each reward before weighting, by name."""
    is_graded: bool = True
    """False if a reward raised or returned NaN: the completion takes no part in the update."""
    cause: str = ""
    """Why it was not graded."""


@dataclass(frozen=True)
class Group:
    """The G completions of one prompt, and their scores once graded.

    Group(problem, (right, wrong)).with_scores((Score(1.0, {"accuracy": 1.0}), Score(0.0, {"accuracy": 0.0})))
    """

    problem: Problem
    completions: tuple[Completion, ...]
    scores: tuple[Score, ...] = ()
    """One per completion; empty before grading."""
    prompt_routed_expert_ids: torch.Tensor | None = field(default=None, compare=False)
    """i32[P, M, k], if recorded: the experts of the prompt's tokens."""

    def with_scores(self, scores: tuple[Score, ...]) -> Group:
        return replace(self, scores=scores)


@dataclass(frozen=True)
class Microbatch:
    """One packed forward pass: each group's prompt once, followed by its completions.

    One group, prompt [a b c], completions [x y w] and [z]:
        token_ids        a b c | x y              T = 5, without w and z: a last token predicts nothing
        position_ids     0 1 2 | 3 4
        segments         (0,3,0,0) (3,2,0,3)      (start, length, prefix_start, prefix_length)
        logits_index     2 3 4 | 2                N = 4: `c` predicts x and z, `x` predicts y, `y` predicts w
        target_ids       x y w | z
        sequence_index   0 0 0 | 1

    With token_mask (True, False, True) y was inserted: context, but no target. The first three lines stay:
        logits_index     2 4 | 2                  N = 3
        target_ids       x w | z
        sequence_index   0 0 | 1
    """

    token_ids: torch.Tensor
    """i64[T]"""
    position_ids: torch.Tensor
    """i32[T]"""
    segments: torch.Tensor
    """i32[S, 4], always on the CPU: the lengths determine the kernel launch."""
    logits_index: torch.Tensor
    """i64[N]: the index in 0..T-1 of the hidden state that predicts loss token n."""
    target_ids: torch.Tensor
    """i64[N]"""
    sequence_index: torch.Tensor
    """i32[N]: 0..num_sequences-1, ascending."""
    num_sequences: int
    advantages: torch.Tensor | None = None
    """f32[N], on the device they were computed on; None for a supervised microbatch (pretraining, SFT)."""
    rollout_logprobs: torch.Tensor | None = None
    """f32[N], as the engine recorded them: the full softmax at the rollout temperature."""
    kept_logmass: torch.Tensor | None = None
    """f32[N]: the behaviour policy's logprob is rollout_logprobs - kept_logmass."""
    old_logprobs: torch.Tensor | None = None
    """f32[N], of the policy before the step's first update."""
    ref_logprobs: torch.Tensor | None = None
    """f32[N], of the frozen reference policy."""
    routed_expert_ids: torch.Tensor | None = None
    """i32[T, M, k], with routing replay: the experts that the sampler recorded for each token."""

    @property
    def num_tokens(self) -> int:
        return int(self.token_ids.numel())

    @property
    def num_loss_tokens(self) -> int:
        return int(self.target_ids.numel())

    def to(self, device: torch.device) -> Microbatch:
        """Every tensor but `segments` on `device`."""
        moved = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if hasattr(value, "to") and name != "segments"
        }
        return replace(self, **moved)


@dataclass(frozen=True)
class StepStats:
    """The results of one RL step, for the log.

    StepStats(12, {"reward": 0.61, "accuracy": 0.58, ...}, {"rollout_s": 1.9, "train_s": 1.2, ...}, groups,
              ((0.7, -0.7), (0.0, 0.0)))
    """

    step: int
    metrics: Mapping[str, float | None]
    """A function of config and seed: the same on every run. None where nothing could be measured."""
    timings: Mapping[str, float]
    """Seconds and rates of this machine."""
    groups: tuple[Group, ...] = ()
    """Of a step that samples."""
    advantages: tuple[tuple[float, ...], ...] = ()
    """Per group and completion; 0.0 for a completion that takes no part in the update."""
    warnings: Mapping[str, str] = field(default_factory=dict)
    """Cause -> text: what the user should see, once a run for each cause."""
