"""The pages of docs/ and the README: their references exist, and their drawings and counts are right."""

from __future__ import annotations

import ast
import copy
import json
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import rms_norm
from bench.cases import Setup
from docs import ladder
from docs.drawings.draw import DRAWINGS, FOLDER, can_see, example_microbatch

ROOT = Path(__file__).resolve().parents[1]
TOUR = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
REFERENCE = re.compile(r"`((?:[\w-]+/)*[\w-]+\.py):([A-Za-z_][\w.]*)`")
STOP = re.compile(r"^## (\d+)\. (.+) \((\d+) minutes\)$", re.MULTILINE)
TEST = re.compile(r"\b(test_\w+)\b(?!\.py)")


def names_in(source: str) -> set[str]:
    """Functions, classes and methods, as "name" and "Class.method"."""
    found = set()
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return found


def broken_references(page: str) -> list[str]:
    return [f"{file}:{name}" for file, name in REFERENCE.findall(page)
            if not (ROOT / file).is_file() or name not in names_in((ROOT / file).read_text(encoding="utf-8"))]


def anchors_of(page: str) -> set[str]:
    """GitHub's anchors of headings: lower case, spaces as hyphens, punctuation dropped."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def broken_links(path: Path, page: str) -> list[str]:
    """Links to files and headings of this repository that do not exist."""
    found = []
    for link in re.findall(r"\]\((?!https?://)([^)\s]+)\)", page):
        file, _, anchor = link.partition("#")
        target = path if not file else (path.parent / file).resolve()
        if not target.exists() or (anchor and anchor not in anchors_of(target.read_text(encoding="utf-8"))):
            found.append(link)
    return found


def named_tests() -> set[str]:
    """Every test function of the repository."""
    files = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")]
    return {name.rpartition(".")[2] for source in files for name in names_in(source)}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_function_that_a_page_names_exists(path: Path):
    assert broken_references(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_link_between_pages_leads_somewhere(path: Path):
    assert broken_links(path, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_file_that_a_page_names_exists(path: Path):
    """Paths in backticks that begin with a folder of ours; `{a,b}` and `<op>` are patterns, not paths."""
    page = path.read_text(encoding="utf-8")
    named = re.findall(r"`((?:reason_rl|kernels|csrc|tests|bench|docs|examples|configs)/[\w./-]+)[`:]", page)
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("name", ["exactness.md", "kernels.md"])
def test_every_test_that_a_page_names_exists(name: str):
    page = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert set(TEST.findall(page)), "the page names no test"
    assert set(TEST.findall(page)) - named_tests() == set()


def test_the_code_on_the_kernels_page_is_the_ops():
    page = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    folder = ROOT / "kernels" / "rms_norm"
    files = [(folder / name).read_text(encoding="utf-8") for name in ("reference.py", "__init__.py")]
    source = "".join(textwrap.dedent(line) for file in files for line in file.splitlines(keepends=True))
    page = page.partition("## Another op")[0]  # tests/test_readme.py runs that one
    for block in re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        assert "".join(textwrap.dedent(line) for line in block.splitlines(keepends=True)) in source


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_module_that_a_page_runs_exists(path: Path):
    for module in re.findall(r"python -m ((?:reason_rl|bench|docs|tests|kernels)[\w.]*)", path.read_text(encoding="utf-8")):
        name = ROOT / module.rstrip(".").replace(".", "/")
        assert name.with_suffix(".py").is_file() or (name / "__main__.py").is_file(), module


def test_the_tour_has_twelve_stops_with_a_question_and_an_answer_each():
    assert [int(number) for number, _, _ in STOP.findall(TOUR)] == list(range(1, 13))
    tour, answers = TOUR.split("\n## Answers\n")
    stops = re.split(r"^## \d+\. ", tour, flags=re.MULTILINE)[1:]
    for stop in stops:
        assert stop.count("**Question.**") == 1 and stop.count("**Skip**") == 1, stop.splitlines()[0]
        assert REFERENCE.search(stop) or "`train.py:main`" in stop, stop.splitlines()[0]
    assert [int(number) for number in re.findall(r"^(\d+)\. ", answers, re.MULTILINE)] == list(range(1, 13))


def test_the_tours_minutes_add_up():
    (total,) = re.findall(r"takes (\d+) minutes", TOUR)
    assert sum(int(minutes) for _, _, minutes in STOP.findall(TOUR)) == int(total)


@pytest.mark.parametrize("page", ["`train.py:no_such`", "`reason_rl/stages/grpo.py:Grpo.no_such`", "`reason_rl/no_such.py:f`"])
def test_a_planted_reference_is_found(page: str):
    assert len(broken_references(page)) == 1


@pytest.mark.parametrize("link", ["no_such.md", "tour.md#no-such-heading", "#no-such-heading"])
def test_a_planted_link_is_found(link: str):
    assert broken_links(ROOT / "docs" / "tour.md", f"[text]({link})") == [link]


@pytest.mark.parametrize("name", DRAWINGS)
def test_a_drawing_is_what_the_code_draws(name: str):
    """After a change: python -m docs.drawings.draw."""
    assert (FOLDER / f"{name}.svg").read_text(encoding="utf-8") == DRAWINGS[name]().render()


def test_the_drawn_mask_lets_a_completion_see_its_prompt_and_its_own_past_alone():
    seen = can_see(example_microbatch())
    assert ["".join("x."[not one] for one in row) for row in seen] == ["x....", "xx...", "xxx..", "xxxx.", "xxxxx"]


RECORD: dict[str, Any] = {
    "setting": {"device_name": "A CPU", "threads": 2, "torch": "2.13.0", "commit": "0123456789abcdef"},
    "rows": [
        {"op": "rms_norm", "shape": "8x4", "dtype": "float32", "side": side, "direction": direction,
         "median_s": seconds, "error": 1e-8}
        for side, seconds in (("reference", 3e-5), ("native", 1e-5), ("F.rms_norm", 2e-5)) for direction in ("forward", "full")]}


def test_the_table_of_times_has_a_line_per_case_and_implementation():
    record = copy.deepcopy(RECORD)
    record["rows"].append({"op": "rms_norm", "shape": "8x4", "dtype": "float32", "side": "liger-kernel", "direction": "forward",
                           "says": "not installed"})
    lines = ladder.table(record).splitlines()
    assert lines[0] == "A CPU, 2 thread(s), torch 2.13.0, commit 0123456789ab:"
    assert lines[-2] == "| 8x4 | float32 | native | 10 us | 10 us | 1.0e-08 |" and len(lines) == 4 + 3


def test_a_record_without_native_kernels_is_refused():
    record = copy.deepcopy(RECORD)
    record["rows"] = [row for row in record["rows"] if row["side"] != "native"]
    with pytest.raises(ValueError, match="native did not run at 8x4 float32"):
        ladder.table(record)


def test_the_times_on_the_page_are_the_records():
    """After a measurement: python -m docs.ladder. Without a record the page has no times."""
    times = ladder.table(json.loads(ladder.RECORD.read_text(encoding="utf-8"))) if ladder.RECORD.is_file() else ""
    page = ladder.PAGE.read_text(encoding="utf-8")
    assert page == ladder.with_times(page, times)


def test_the_bench_measures_what_the_table_shows():
    for case in rms_norm.cases(Setup(torch.device("cpu"))):
        assert case.op != "rms_norm" or set(case.sides) >= set(ladder.IMPLEMENTATIONS)


def test_the_readme_is_at_most_150_lines():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
