"""The folder of one stage's output, runs/stages/<name>-<digest>: step checkpoints and, once finished,
`final`.

Runs whose stage has the same key share the folder. A lock file next to it admits one at a time: a second run
waits for the first and then reuses its output, or continues from its newest checkpoint if the first was
interrupted.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from reason_rl.parallel.world import World
from reason_rl.report.log import METRICS, ROLLOUTS, TIMINGS, read_jsonl
from reason_rl.report.terminal import View
from reason_rl.trainer.checkpoint import Progress, newest_checkpoint, read_progress, step_folder

FINAL = "final"
LOCK_POLL_S = 1.0
History = dict[str, list[dict[str, Any]]]
"""File name (metrics.jsonl, timings.jsonl) -> the stage's lines."""


class Interrupted(Exception):
    """The run was asked to stop (Ctrl-C, SIGTERM) and has saved its progress."""


@dataclass(frozen=True)
class StageFolder:
    path: Path

    @property
    def final(self) -> Path:
        """The finished output: a Hugging Face checkpoint with the stage's log and seconds."""
        return self.path / FINAL

    @property
    def rollouts(self) -> Path:
        """The stage's sampled rollouts; a run that reuses the output shows them in its report."""
        return self.path / ROLLOUTS

    def is_finished(self, world: World) -> bool:
        return world.gather(self.final.is_dir())[0]

    def newest_checkpoint(self, world: World) -> Path | None:
        """Rank 0's result, on all ranks."""
        return world.gather(newest_checkpoint(self.path))[0]

    def step_folder(self, num_done: int) -> Path:
        return step_folder(self.path, num_done)

    def progress(self) -> Progress:
        return read_progress(self.final)

    @contextmanager
    def lock(self, world: World, view: View, should_stop: Callable[[], bool]) -> Iterator[None]:
        """Rank 0 holds a file lock, which the system releases if the process dies; the other ranks wait."""
        # Wait until rank 0 has the lock.
        lock = self.path.with_name(f"{self.path.name}.lock")
        file: TextIO | None = None

        def take() -> bool:
            nonlocal file
            file = try_lock(lock)
            return file is not None

        is_ours = world.from_main(take)
        if not is_ours:
            view.message(f"Another run is making this stage ({lock}): waiting for it to finish.")
        while not is_ours:
            if any(world.gather(should_stop())):
                raise Interrupted("stopped while waiting for another run's stage")
            time.sleep(LOCK_POLL_S)
            is_ours = world.from_main(take)

        # Hold it for the block.
        try:
            yield
        finally:
            if file is not None:
                release(file)


def read_history(checkpoint: Path) -> History:
    return {name: read_jsonl(checkpoint / name) for name in (METRICS, TIMINGS)}


def try_lock(path: Path) -> TextIO | None:
    """The file at `path`, locked, or None if another process holds it. The system releases the lock however the process ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a", encoding="utf-8")
    with suppress(BlockingIOError, FileNotFoundError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The holder removes the file before it releases the lock, and a lock on a removed file excludes no
        # other run.
        if os.fstat(file.fileno()).st_ino == path.stat().st_ino:
            return file
    file.close()
    return None


def release(lock: TextIO) -> None:
    """Removes the lock's file, then the lock."""
    Path(lock.name).unlink(missing_ok=True)
    lock.close()
