"""`Clock`: seconds of a step by name, so that the algorithm reads without timing arithmetic.

    with clock("rollout"):
        groups = ...
    clock.seconds  # {"rollout": 1.7}
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Adds up wall-clock seconds under each name.

    Blocks may be nested: each name counts the whole of its outermost block, inner blocks included.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._running: set[str] = set()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if name in self._running:  # the outer block counts this time
            yield
            return
        self._running.add(name)
        start = time.perf_counter()
        try:
            yield
        finally:
            self._running.discard(name)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
