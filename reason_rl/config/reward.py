"""The [reward] section of a run's configuration: weights, deadlines and limits. Part of config.py, which reads and checks it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class RewardConfig:
    """Weights of the reward's parts. Accuracy, format and overlong are computed and logged whatever their weight, the others where
    it is not 0; docs/rewards.md has each of them."""

    accuracy: float = 1.0
    format: float = 0.1
    overlong: float = 0.0
    """Weight of DAPO's soft overlong penalty, which is 0 up to max_tokens - overlong_buffer and -1 at max_tokens."""
    overlong_buffer: int = 16
    """Tokens before max_tokens over which the penalty grows."""
    custom: str = ""
    """A reward of your own as "module:function"; it takes the arguments of reason_rl/reward/custom.py by name and returns a
    number."""
    custom_weight: float = 1.0
    custom_deadline_s: float = 20.0
    """For one completion; beyond it the completion is ungraded."""
    judge: str = ""
    """Like `custom`, for a function that asks another model: "module:function"."""
    judge_weight: float = 1.0
    """A judge's numbers are its own, so 1 may be much."""
    judge_deadline_s: float = 120.0
    """For one completion; beyond it the completion is ungraded."""
    judge_workers: int = 8
    """How many completions are judged at a time."""
    model: str = ""
    """The folder of a reward model: a checkpoint with a reward_head.safetensors."""
    model_weight: float = 1.0
    """Its scores go from 0 to 1."""
    model_deadline_s: float = 60.0
    """For one completion; beyond it the completion is ungraded."""
    verifier: Literal["auto", "text", "math", "countdown", "code"] = "auto"
    """What decides accuracy. "auto" goes by the task: math for gsm8k, math and jsonl, code for code, countdown for its
    own, else text."""
    math_deadline_s: float = 5.0
    """For one answer; beyond it the completion is ungraded."""
    workers: int = 2
    """Processes of each kind of verifier, started when first needed, for each training process."""
    max_queued: int = 4096
    """Requests waiting for a worker, beyond which sampling waits too."""
    code_sandbox: Literal["any", "namespaces", "landlock", "all"] = "any"
    """What must hold beside resource limits before a candidate's program is run. "any": namespaces or Landlock; "all": both, and
    seccomp. What the machine gives beyond that is used too; where the required set does not hold, code is not run."""
    code_deadline_s: float = 12.0
    """Wall clock for one program and all its tests; beyond it the program is wrong. Thrice code_cpu_s, so that on a busy machine
    a right program is not wrong for having waited; no more, since a program that sleeps keeps its worker as long."""
    code_cpu_s: int = 4
    """Processor seconds. The slowest right program of MBPP takes 2.7 (AMD EPYC)."""
    code_memory_mb: int = 512
    """Address space."""
    code_file_mb: int = 16
    """Its scratch folder, which lives in memory where namespaces hold."""
    code_output_kb: int = 64
    """What it may print."""
    code_threads: int = 32
    """Processes it can never start."""
    code_partial: bool = False
    """Pay the share of tests passed; else all or nothing."""
