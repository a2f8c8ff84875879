"""The folder of an evaluation: which problems are done, under which setting; rows are added as problems finish.

    setting.json     all that the rows follow from; another setting in the same folder is refused with the difference
    problems.jsonl   a row a problem, in the problems' order once all are there
    summary.json     what the rows come to, written last

Rank 0 adds to problems.jsonl, rank r to problems.<r>.jsonl beside it; `collect` puts the parts together, at the start for what an
earlier sitting left, and at the end. So the files are the same whatever the sittings and processes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from reason_rl.parallel.world import World
from reason_rl.report.log import finite, read_jsonl

SETTING_FILE, ROWS_FILE, SUMMARY_FILE = "setting.json", "problems.jsonl", "summary.json"
SAMPLED_BYTES = 1 << 20
"""Read of each end of a weights file, for its fingerprint: an update moves every matrix, and gigabytes need not be hashed."""


class EvalFolder:
    def __init__(self, path: Path, world: World, setting: Mapping[str, Any], problem_ids: Sequence[int]) -> None:
        self.path, self.world, self.setting = path, world, dict(setting)
        self.order = {problem_id: place for place, problem_id in enumerate(problem_ids)}
        assert len(self.order) == len(problem_ids), "a problem stands twice among those to evaluate"
        self._part: TextIO | None = None

    def open(self) -> set[int]:
        """-> the ids of the problems that are done, the same on every rank. Makes the folder; raises ValueError for another
        setting's."""
        answer: tuple[set[int], str] = (set(), "")
        if self.world.is_main:
            try:
                self._claim()
                answer = ({row["problem_id"] for row in self.collect()}, "")
            except (ValueError, OSError) as error:
                answer = (set(), str(error))
        done, refusal = self.world.gather(answer)[0]
        if refusal:
            raise ValueError(refusal)
        return done

    def _claim(self) -> None:
        path = self.path / SETTING_FILE
        if not path.is_file():
            self.path.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(self.setting, indent=2) + "\n")
            return
        try:
            old = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        differences = [f"{key}: {old.get(key)!r} -> {self.setting.get(key)!r}"
                       for key in dict.fromkeys([*old, *self.setting]) if old.get(key) != self.setting.get(key)]
        if differences and not any(part.stat().st_size for part in self.path.glob(f"{Path(ROWS_FILE).stem}*.jsonl")):
            write_whole(path, json.dumps(self.setting, indent=2) + "\n")  # nothing came of it, a shard was missing perhaps
        elif differences:
            raise ValueError(f"{self.path} holds an evaluation of another setting; give this one an --out of its own. The "
                             "differences:\n  " + "\n  ".join(differences))

    def append(self, row: Mapping[str, Any]) -> None:
        """One line, on disk when this returns."""
        if self._part is None:
            name = ROWS_FILE if self.world.is_main else f"{Path(ROWS_FILE).stem}.{self.world.rank}.jsonl"
            self._part = (self.path / name).open("a", encoding="utf-8")
        self._part.write(json.dumps(finite(row), allow_nan=False) + "\n")
        self._part.flush()

    def close(self) -> None:
        if self._part is not None:
            self._part.close()
            self._part = None

    def collect(self) -> list[dict[str, Any]]:
        """All rows, put into one file in the problems' order; for rank 0, while nobody writes."""
        parts = sorted(self.path.glob(f"{Path(ROWS_FILE).stem}.*.jsonl"))
        found = {row["problem_id"]: row for part in [*parts, self.path / ROWS_FILE] for row in read_jsonl(part)}
        rows = [found[problem_id] for problem_id in self.order if problem_id in found]
        write_whole(self.path / ROWS_FILE, "".join(json.dumps(row) + "\n" for row in rows))
        for part in parts:
            part.unlink()
        return rows

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        write_whole(self.path / SUMMARY_FILE, json.dumps(finite(summary), indent=2, allow_nan=False) + "\n")


def fingerprint(checkpoint: Path) -> str:
    """Of a checkpoint's config, tokenizer and weights: it tells a folder from another that took its place."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted([*checkpoint.glob("*.json"), *checkpoint.glob("*.safetensors")]):
        size = path.stat().st_size
        digest.update(f"{path.name}/{size}/".encode())
        with path.open("rb") as file:
            digest.update(file.read(SAMPLED_BYTES))
            file.seek(max(0, size - SAMPLED_BYTES))
            digest.update(file.read(SAMPLED_BYTES))
    return digest.hexdigest()


def write_whole(path: Path, text: str) -> None:
    """The file is the old one or the new one, never a part."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
