"""Reads and writes the files of a run: atomic writes of a file and of a folder, JSONL, and plain JSON values.

Everything that is written whole goes through `atomic_write_text` or `atomic_folder`: a reader, or a run that
continues after a crash, finds the old text or the new one, never a mix. Files that grow line by line
(metrics.jsonl) are appended to in log.py; `read_jsonl` drops the last line of such a file if a crash has cut it
off. Left out: binary formats.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h

Row = dict[str, Any]
"""One object of a JSONL file."""


def atomic_write_text(path: str | Path, text: str) -> None:
    """Replaces `path` by a file that holds `text`, in UTF-8; after the call it survives a power cut."""
    path = Path(path)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.partial")  # same file system: an atomic rename
    try:
        with scratch.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # before the rename: else a crash can leave the new name with no data
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    _sync(path.parent)  # the rename itself


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields a new folder to fill, which replaces `path` when the block ends: `path` is always whole, old or new.

    An error in the block leaves `path` unchanged.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for content in (*partial.rglob("*"), partial):  # before the rename, as above
            _sync(content)
        if path.exists():
            _exchange(partial, path)  # a rename cannot replace a folder that has files
        else:
            os.rename(partial, path)
        _sync(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # the old folder, or what an error left


def _exchange(a: Path, b: Path) -> None:
    """Swaps two names in one step (renameat2: Linux, glibc 2.28). Without it, in three steps: a kill between them
    leaves the old folder under the name <a>.old."""
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2") and libc.renameat2(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), RENAME_EXCHANGE) == 0:
        return
    spare = a.with_name(f"{a.name}.old")
    os.rename(b, spare)
    os.rename(a, b)
    os.rename(spare, a)


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def read_jsonl(path: str | Path) -> list[Row]:
    """The objects of a JSONL file; [] when it is absent. An incomplete last line is dropped."""
    path = Path(path)
    if not path.is_file():
        return []
    # Not splitlines(): it also splits at U+2028 and U+0085, which may be inside a string.
    lines = path.read_text(encoding="utf-8", errors="replace").rstrip("\n").split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number}: expected a JSON object, got {line[:60]!r}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: expected a JSON object, got {line[:60]!r}")
        rows.append(row)
    return rows


def jsonl(rows: Sequence[Mapping[str, Any]]) -> str:
    """The text of a JSONL file with these objects, one a line."""
    return "".join(json.dumps(finite(row), allow_nan=False) + "\n" for row in rows)


def finite(value: Any) -> Any:
    """`value` as plain JSON: tensors and numpy scalars become numbers, NaN and infinities become None."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, str) or value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "tolist"):  # torch and numpy, scalars and arrays
        return finite(value.tolist())
    if isinstance(value, Sequence):
        return [finite(item) for item in value]
    raise ValueError(f"expected a number, text, list or mapping, got {type(value).__name__}")
