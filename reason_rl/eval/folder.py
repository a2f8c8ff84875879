"""The folder of an evaluation: its setting, a row for each finished problem, and the summary.

    setting.json     everything that the rows depend on; a folder with another setting is refused with the difference
    problems.jsonl   one row per problem, in the problems' order once all are finished
    summary.json     estimates over all rows, written last

While sampling, rank 0 appends to problems.jsonl and rank r to problems.<r>.jsonl. `merge` joins these files: at the start those of
an interrupted command, and at the end. So the files do not depend on interruptions or on the number of processes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from reason_rl.parallel.world import World
from reason_rl.records import ConfigError
from reason_rl.report.files import atomic_write_text, finite, jsonl, read_jsonl

SETTING_FILE, ROWS_FILE, SUMMARY_FILE = "setting.json", "problems.jsonl", "summary.json"
SAMPLED_BYTES = 1 << 20
"""Bytes hashed at each end of a weights file. An update changes every matrix, so the gigabytes between need no hashing."""


class EvalFolder:
    def __init__(self, path: Path, world: World, setting: Mapping[str, Any], problem_ids: Sequence[int]) -> None:
        assert len(set(problem_ids)) == len(problem_ids), "the problems to evaluate must be distinct"
        self.path, self.world, self.setting, self.problem_ids = path, world, dict(setting), tuple(problem_ids)
        self._rows: TextIO | None = None

    def open(self) -> set[int]:
        """Makes the folder -> the ids of problems that have a row, the same on every rank.

        Raises ValueError on every rank if the folder has rows of another setting.
        """
        done: set[int] = set()
        refusal = ""
        if self.world.is_main:
            try:
                self._write_setting()
                done = {row["problem_id"] for row in self.merge()}
            except (ValueError, OSError) as error:
                refusal = str(error)
        done, refusal = self.world.gather((done, refusal))[0]
        if refusal:
            raise ConfigError(refusal)
        return done

    def _write_setting(self) -> None:
        """Writes setting.json, or checks that it equals this setting."""
        path = self.path / SETTING_FILE
        old: dict[str, Any] = {}
        if path.is_file():
            try:
                old = json.loads(path.read_text(encoding="utf-8"))
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise ConfigError(f"{path} is damaged: {error}") from error
            if old == self.setting:
                return

        # A folder without rows may take another setting: an earlier command failed before its first row.
        if any(file.stat().st_size for file in [self.path / ROWS_FILE, *self._files_of_ranks()] if file.is_file()):
            differences = [f"{key}: {old.get(key)!r} -> {self.setting.get(key)!r}"
                           for key in dict.fromkeys([*old, *self.setting]) if old.get(key) != self.setting.get(key)]
            raise ConfigError(f"{self.path} has an evaluation of another setting; give this one another --out. "
                             "The differences:\n  " + "\n  ".join(differences))
        self.path.mkdir(parents=True, exist_ok=True)
        atomic_write_text(path, json.dumps(self.setting, indent=2) + "\n")

    def _files_of_ranks(self) -> list[Path]:
        return sorted(self.path.glob(f"{Path(ROWS_FILE).stem}.*.jsonl"))

    def append(self, row: Mapping[str, Any]) -> None:
        """Adds one row to this rank's file, flushed when this returns."""
        if self._rows is None:
            name = ROWS_FILE if self.world.is_main else f"{Path(ROWS_FILE).stem}.{self.world.rank}.jsonl"
            self._rows = (self.path / name).open("a", encoding="utf-8")
        self._rows.write(jsonl([row]))
        self._rows.flush()

    def close(self) -> None:
        if self._rows is not None:
            self._rows.close()
            self._rows = None

    def merge(self) -> list[dict[str, Any]]:
        """Joins all rows in problems.jsonl, in the problems' order, and returns them. Rank 0 only, while no rank appends."""
        files_of_ranks = self._files_of_ranks()
        found = {row["problem_id"]: row for path in [*files_of_ranks, self.path / ROWS_FILE] for row in read_jsonl(path)}
        rows = [found[problem_id] for problem_id in self.problem_ids if problem_id in found]
        atomic_write_text(self.path / ROWS_FILE, jsonl(rows))
        for path in files_of_ranks:
            path.unlink()
        return rows

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        atomic_write_text(self.path / SUMMARY_FILE, json.dumps(finite(summary), indent=2, allow_nan=False) + "\n")


def fingerprint(checkpoint: Path) -> str:
    """Hash of a checkpoint's config, tokenizer and weights: it changes if other files take the folder's place."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted([*checkpoint.glob("*.json"), *checkpoint.glob("*.safetensors")]):
        size = path.stat().st_size
        digest.update(f"{path.name}/{size}/".encode())
        with path.open("rb") as file:
            digest.update(file.read(SAMPLED_BYTES))
            file.seek(max(0, size - SAMPLED_BYTES))
            digest.update(file.read(SAMPLED_BYTES))
    return digest.hexdigest()
