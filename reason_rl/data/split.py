"""Which share a problem belongs to, and the number it goes by: hashes of its text, the same in every run and on every machine."""

from __future__ import annotations

import hashlib
from typing import Literal

from reason_rl.config import TaskConfig

Split = Literal["train", "rl", "heldout"]


def split_of(key: str, task: TaskConfig) -> Split:
    """The share an exercise's key belongs to: a fixed point of [0, 1) by hash, cut at heldout_share and rl_share."""
    point = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8, person=b"split").digest(), "big") / 2**64
    if point < task.heldout_share:
        return "heldout"
    return "rl" if point < task.heldout_share + task.rl_share else "train"


def problem_id_of(task_name: str, prompt: str) -> int:
    """Stable, in [0, 2**62)."""
    digest = hashlib.blake2b(f"{task_name}/{prompt}".encode(), digest_size=8, person=b"problem").digest()
    return int.from_bytes(digest, "big") >> 2
