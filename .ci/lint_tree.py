"""Part of `make lint`: lines of code by room, with two budgets, and a list of phrases that the prose avoids.

    python .ci/lint_tree.py

The path that a reader follows is the files that docs/tour.md names; the tree is all code outside tests and bench.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PATH_BUDGET, TREE_BUDGET = 4_000, 30_000
CODE = {".py", ".cpp", ".h", ".cu", ".cuh", ".js", ".css", ".jinja"}
PROSE = CODE | {".md", ".toml"}
PHRASES = [line for line in (ROOT / ".ci" / "phrases.txt").read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
BANNED = re.compile("|".join(PHRASES), re.IGNORECASE)


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [path for name in listed.stdout.splitlines() if (path := ROOT / name).is_file()]


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return "/".join(parts[:2]) if parts[0] == "reason_rl" and len(parts) > 2 else parts[0]


def num_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def count(paths: list[Path]) -> list[str]:
    """Prints lines by room -> which budgets are exceeded."""
    rooms: Counter[str] = Counter()
    for path in paths:
        if path.suffix in CODE and path.relative_to(ROOT).parts[0] not in ("tests", "bench", ".ci"):
            rooms[room_of(path)] += num_lines(path)
    tour = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
    followed = sorted({ROOT / name for name in re.findall(r"`([\w/.]+\.py)(?::[\w.]+)?`", tour)})
    path_lines = sum(map(num_lines, followed))
    for room, lines in sorted(rooms.items(), key=lambda item: -item[1]):
        print(f"{lines:7,}  {room}")
    print(f"{sum(rooms.values()):7,}  the tree outside tests and bench (at most {TREE_BUDGET:,})")
    print(f"{path_lines:7,}  the path of docs/tour.md, {len(followed)} files (at most {PATH_BUDGET:,})")
    return [f"{name}: {lines:,} lines, at most {budget:,}" for name, lines, budget in (
        ("the tree", sum(rooms.values()), TREE_BUDGET), ("the path of docs/tour.md", path_lines, PATH_BUDGET)) if lines > budget]


def phrases(paths: list[Path]) -> list[str]:
    """Where a banned phrase is used, by file and line."""
    found = []
    for path in paths:
        if path.suffix not in PROSE:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if match := BANNED.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {match.group()!r} in: {line.strip()[:100]}")
    return found


def main() -> int:
    paths = tracked()
    problems = [*count(paths), *phrases(paths)]
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
