"""Fixtures of every test: no state from an earlier test, and a skip with its reason if a device or browser is missing.

Uninitialised memory is poisoned: `torch.empty` and its variants return NaN (integers: the largest value), so that
an op that reads memory before it writes it always fails.
"""

from __future__ import annotations

import hashlib
import random
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = {}
    if not torch.cuda.is_available():
        missing["gpu"] = pytest.mark.skip(reason="needs a CUDA device")
    if not any(shutil.which(name) for name in BROWSERS):
        missing["browser"] = pytest.mark.skip(reason=f"needs one of {', '.join(BROWSERS)}")
    for item in items:
        for name, skip in missing.items():
            if item.get_closest_marker(name):
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def no_global_state(request: pytest.FixtureRequest) -> Iterator[None]:
    """Seeds the global generators by the test's name; restores threads, dtype and determinism."""
    key = int.from_bytes(hashlib.sha256(request.node.nodeid.encode()).digest()[:4])
    random.seed(key)
    np.random.seed(key)
    torch.manual_seed(key)
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name in [(torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")]:
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


def poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def call(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = make(*args, **kwargs)
        if type(tensor) is not torch.Tensor or tensor.is_meta:
            return tensor
        with torch.no_grad():
            if tensor.is_floating_point():
                tensor.fill_(torch.nan)
            elif tensor.dtype in (torch.int8, torch.int16, torch.int32, torch.int64):
                tensor.fill_(torch.iinfo(tensor.dtype).max)
        return tensor

    return call
