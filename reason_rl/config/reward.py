"""The [reward] section: weights of the rewards, deadlines, and limits of candidate programs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class RewardConfig:
    """Weights of the reward's parts. Accuracy, format and overlong are always computed and logged, custom,
    judge and model if they are set, all of them even with weight 0. docs/rewards.md describes each."""

    accuracy: float = 1.0
    """Weight of the verified answer: 1 if right, else 0 (code_partial: a share)."""
    format: float = 0.1
    """Weight of the format: 1 if the completion has the expected tags, else 0."""
    overlong: float = 0.0
    """Weight of DAPO's soft overlong penalty: 0 up to max_tokens - overlong_buffer tokens, then linear down
    to -1 at max_tokens."""
    overlong_buffer: int = 16
    """Tokens before sampling.max_tokens over which the penalty grows."""
    custom: str = ""
    """Your own reward as "module:function". It takes arguments of reason_rl/reward/custom.py by name and
    returns a number."""
    custom_weight: float = 1.0
    custom_deadline_s: float = 20.0
    """Seconds for one completion; after that the completion is ungraded."""
    judge: str = ""
    """Like `custom`, for a function that asks another model: "module:function"."""
    judge_weight: float = 1.0
    """Scores are not rescaled: set the weight to the judge's range."""
    judge_deadline_s: float = 120.0
    """Seconds for one completion; after that the completion is ungraded."""
    judge_workers: int = 8
    """Completions judged at the same time, each in a worker process."""
    model: str = ""
    """The folder of a reward model: a checkpoint with a reward_head.safetensors."""
    model_weight: float = 1.0
    """Weight of the reward model's scores, which are between 0 and 1."""
    model_deadline_s: float = 60.0
    """Seconds for one completion; after that the completion is ungraded."""
    verifier: Literal["auto", "text", "math", "countdown", "code"] = "auto"
    """The verifier of accuracy. "auto" depends on the task: math for gsm8k, math and jsonl, code for code,
    countdown for countdown, else text."""
    math_deadline_s: float = 5.0
    """Seconds for one answer; after that the completion is ungraded."""
    workers: int = 2
    """Worker processes of each verifier in each training process, started at its first request.
    Exceptions: code has one per CPU core, a reward model one, a judge judge_workers."""
    max_queued: int = 4096
    """Most requests that wait for a worker; sampling waits while the queue is full."""
    code_sandbox: Literal["any", "namespaces", "landlock", "all"] = "any"
    """Isolation that is required, in addition to resource limits, to run a candidate's program. "any":
    namespaces or Landlock. "all": namespaces, Landlock and seccomp. The others are used too if the machine
    has them. If a required one is missing, no program is run and the run is refused."""
    code_deadline_s: float = 12.0
    """Wall-clock seconds for one program and all its tests; a program that needs longer is wrong. Three times
    code_cpu_s, so that a busy machine does not fail right programs; no more, because a sleeping program keeps
    its worker this long."""
    code_cpu_s: int = 4
    """CPU seconds of one program. The slowest right program of MBPP takes 2.7 (AMD EPYC)."""
    code_memory_mb: int = 512
    """MiB of address space."""
    code_file_mb: int = 16
    """MiB in the scratch folder, which is in memory if namespaces are available."""
    code_output_kb: int = 64
    """KiB of printed output; a program that prints more is wrong."""
    code_threads: int = 32
    """Most threads of one program. With seccomp it can start no process."""
    code_partial: bool = False
    """Accuracy is the share of tests passed; false: 1 if all tests pass, else 0."""
