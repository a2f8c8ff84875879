"""Assigns exercises to splits, and ids to problems, by hashes that are the same on every machine."""

from __future__ import annotations

import hashlib
from typing import Literal

from reason_rl.config import TaskConfig

Split = Literal["corpus", "train", "heldout"]
"""corpus: documents for pretraining. train: problems for RL. heldout: problems for evaluation."""


def split_of(key: str, task: TaskConfig) -> Split:
    """Hashes the key to [0, 1): below heldout_share it is held out, in the next rl_share it is for RL."""
    point = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8, person=b"split").digest(), "big") / 2**64
    if point < task.heldout_share:
        return "heldout"
    return "train" if point < task.heldout_share + task.rl_share else "corpus"


def share_of(split: Split, task: TaskConfig) -> tuple[str, float]:
    """(config key, value) of what sets the split's size: ("task.rl_share", 0.05) for train."""
    return ("task.heldout_share", task.heldout_share) if split == "heldout" else ("task.rl_share", task.rl_share)


def problem_id_of(task_name: str, prompt: str) -> int:
    """Stable, in [0, 2**62)."""
    digest = hashlib.blake2b(f"{task_name}/{prompt}".encode(), digest_size=8, person=b"problem").digest()
    return int.from_bytes(digest, "big") >> 2
