"""Every dataclass that crosses a room.

A GRPO step passes these along: `Problem` (data) -> `Group` of `Completion`s (engine) -> `Score` (reward)
-> `Microbatch` (rl.packing) -> `StepStats` (trainer). They hold facts, so they are frozen; what computes lives in the rooms.

Letters: B prompts, G group size, S segments, T packed tokens, N loss tokens, V vocabulary, L layers, K experts per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # named in annotations alone: a verifier's worker reads `Problem` from here and must start without torch
    import torch

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Problem:
    """A task's row: what the policy sees, and what the verifier knows."""

    problem_id: int
    """Non-negative and stable: the sampler's noise is keyed by it, so it never depends on the batch."""
    task: str
    prompt: str
    """The text as given to the policy, template included."""
    prompt_ids: tuple[int, ...]
    answer: str
    """The right answer (for tasks with one), or an example of one (countdown)."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What the verifier needs beyond `answer`; e.g. countdown's `{"numbers": [9, 8, 7], "target": 16}`."""
    level: int = 0
    """Difficulty in the task's own unit: lines of a program, numbers of a countdown."""
    completion_prefix: str = ""
    """What the prompt ends with and the completion is taken to begin with, such as "<think>": verifiers read both as one."""


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn: the [sampling] section of a config, and what the engine takes.

    `SamplingParams(temperature=0.6, top_p=0.95, max_tokens=512, stop_ids=(1,))`
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
            raise ValueError(f"sampling.temperature must be >= 0, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"sampling.top_k must be >= 0 (0 keeps all), got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"sampling.top_p must be in (0, 1], got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"sampling.min_p must be in [0, 1], got {self.min_p}")
        if self.max_tokens < 1:
            raise ValueError(f"sampling.max_tokens must be >= 1, got {self.max_tokens}")


@dataclass(frozen=True)
class Completion:
    """The tokens one sample drew, stop token included, exactly as sampled: they are never re-tokenised."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Per token, in nats: log of the full softmax at the rollout temperature."""
    kept_logmass: tuple[float, ...]
    """Per token, the log of the mass that truncation (top-k, top-p, min-p) kept; 0.0 where nothing was cut.
    The truncated policy's logprob is `logprobs - kept_logmass`."""
    finish_reason: FinishReason
    policy_version: int
    """How many optimizer steps the sampling weights had seen."""
    sample_index: int
    """0..G-1 within the group; part of the noise key."""
    routes: torch.Tensor | None = field(default=None, compare=False)
    """i32[n - 1, L, k] where asked for: the experts of each of the n tokens but the last, which no forward saw."""


@dataclass(frozen=True)
class Score:
    """What the verifiers said of one completion."""

    value: float
    """The weighted sum that the advantage is computed from."""
    parts: Mapping[str, float]
    """Each reward part before weighting, by name."""
    is_graded: bool = True
    """False when a reward raised or returned NaN: the completion then takes no part in the update."""
    cause: str = ""
    """Why it was not graded."""


@dataclass(frozen=True)
class Group:
    """The G completions of one prompt, with their scores once graded."""

    problem: Problem
    completions: tuple[Completion, ...]
    scores: tuple[Score, ...] = ()
    prompt_routes: torch.Tensor | None = field(default=None, compare=False)
    """i32[P, L, k] where asked for: the experts of the prompt's tokens."""

    def with_scores(self, scores: tuple[Score, ...]) -> Group:
        return replace(self, scores=scores)


@dataclass(frozen=True)
class Microbatch:
    """One packed forward pass: each group's prompt stands once, its completions follow it.

    Worked example, one group, prompt [a b c], completions [x y w] and [z]:
        token_ids        a b c | x y              T = 5: a completion's last token predicts nothing, so it has no row
        position_ids     0 1 2 | 3 4
        segments         (0,3,0,0) (3,2,0,3)      (start, length, prefix_start, prefix_length)
        logits_index  2 3 4 | 2                N = 4: `c` predicts x and z, `x` predicts y, `y` predicts w
        target_ids       x y w | z
        sequence_index   0 0 0 | 1
    """

    token_ids: torch.Tensor
    """i64[T]"""
    position_ids: torch.Tensor
    """i32[T]"""
    segments: torch.Tensor
    """i32[S, 4], on the CPU (the lengths shape the launch)."""
    logits_index: torch.Tensor
    """i64[N]: the row of the hidden states that predicts loss token n."""
    target_ids: torch.Tensor
    """i64[N]"""
    sequence_index: torch.Tensor
    """i32[N]: 0..num_sequences-1, ascending."""
    num_sequences: int
    advantages: torch.Tensor | None = None
    """f32[N]; None for a supervised microbatch (pretraining, SFT)."""
    rollout_logprobs: torch.Tensor | None = None
    """f32[N], as the engine recorded them: the full softmax at the rollout temperature."""
    kept_logmass: torch.Tensor | None = None
    """f32[N]: the behaviour policy's logprob is rollout_logprobs - kept_logmass."""
    old_logprobs: torch.Tensor | None = None
    """f32[N], of the policy before the step's first update."""
    ref_logprobs: torch.Tensor | None = None
    """f32[N], of the frozen reference."""
    routes: torch.Tensor | None = None
    """i32[T, L, k] with routing replay: the experts that the sampler chose for each row."""

    @property
    def num_tokens(self) -> int:
        return int(self.token_ids.numel())

    @property
    def num_loss_tokens(self) -> int:
        return int(self.target_ids.numel())

    def to(self, device: torch.device) -> Microbatch:
        """Everything but `segments` on `device`."""
        moved = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if hasattr(value, "to") and name != "segments"
        }
        return replace(self, **moved)


@dataclass(frozen=True)
class StepStats:
    """What one RL step has to say. `metrics` follows from config and seed alone; `timings` is the machine's."""

    step: int
    metrics: dict[str, float | None]
    timings: dict[str, float]
    groups: tuple[Group, ...]
    advantages: tuple[tuple[float, ...], ...]
    """Per group and completion; 0.0 where the completion took no part."""
