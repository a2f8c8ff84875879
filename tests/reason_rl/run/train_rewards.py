"""Rewards for the tests of a whole run, named in its config as "tests.reason_rl.run.train_rewards:<function>"."""

from __future__ import annotations

import os
import zlib

from reason_rl.records import Problem


def by_hash(problem: Problem, text: str) -> float:
    """Arbitrary but fixed, so that even an untrained model's groups have signal."""
    return zlib.crc32(f"{problem.problem_id}/{text}".encode()) % 8 / 8


def raises_at_times(problem: Problem, text: str) -> float:
    if by_hash(problem, text) < 0.25:
        raise RuntimeError("no idea")
    return by_hash(problem, text)


def nan_at_times(problem: Problem, text: str) -> float:
    return float("nan") if by_hash(problem, text) < 0.25 else by_hash(problem, text)


def always_raises(problem: Problem, text: str) -> float:
    raise RuntimeError("never any idea")


def dies_at_times(problem: Problem, text: str) -> float:
    if by_hash(problem, text) < 0.25:
        os._exit(3)
    return by_hash(problem, text)
