"""Who may import whom: rooms have levels, an import goes to a lower level or stays in its room, and modules form no circle."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# From low to high. Every module of ours belongs to one of these rooms.
LEVELS: tuple[tuple[str, ...], ...] = (
    ("kernels",), ("records",), ("config", "report"), ("model", "rl", "answers"), ("engine", "parallel", "data", "sandbox"),
    ("trainer", "reward"), ("thinking", "rollout"), ("eval",), ("stages", "serve"), ("run",), ("explain",), ("train",))
LEVEL_OF = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}

# Rooms that may import less than all rooms below them: others of ours (a dotted name: that module alone).
NARROW: dict[str, set[str]] = {
    "kernels": set(), "records": set(), "config": {"records", "kernels.grpo_loss.spec"}, "report": {"records"},
    "answers": {"records"}, "sandbox": {"records"}, "data": {"records", "config", "answers"},
    "rl": {"kernels", "records", "config"}}
# Rooms that may import only these packages from outside the standard library; no room imports transformers.
# flash_attn is imported only inside the function that an explicit request for it reaches.
OUTSIDE = {"kernels": {"torch", "triton", "flash_attn"}, "records": {"torch"}, "config": set(), "answers": {"mpmath"},
           "sandbox": set()}


def room_of(module: str) -> str:
    """'reason_rl.rl.packing' -> 'rl', 'kernels.moe' -> 'kernels', 'numpy.linalg' -> 'numpy'."""
    first, *rest = module.split(".")
    return rest[0] if first == "reason_rl" and rest else first


def imports_of(source: str, module: str, is_package: bool, top_level: bool = False) -> Iterator[str]:
    """Dotted names: `from a import b` as 'a.b', relative ones made absolute, importlib's with a plain string too.

    top_level: only imports that run when the module is imported.
    """
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in _nodes(ast.parse(source), top_level):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            yield from (".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            yield from (a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str))


def _nodes(tree: ast.AST, top_level: bool) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(tree):
        is_late = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        is_for_types = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        yield child
        if not (top_level and (is_late or is_for_types)):
            yield from _nodes(child, top_level)


def is_allowed(name: str, room: str) -> bool:
    top, target = name.split(".")[0], room_of(name)
    if top in sys.stdlib_module_names or name == "reason_rl.__version__":
        return True
    if top == "transformers" or room == "reason_rl":  # reason_rl/__init__.py: every room imports it, so it imports none
        return False
    if top not in ("reason_rl", "kernels", "train"):
        return room not in OUTSIDE or top in OUTSIDE[room]
    if target == room:
        return True
    if room in NARROW:
        return target in NARROW[room] or any(f"{name}.".startswith(f"{arrow}.") for arrow in NARROW[room] if "." in arrow)
    return LEVEL_OF.get(target, 99) < LEVEL_OF[room]


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    room = room_of(module)
    names = imports_of(source, module, is_package)
    return [f"{module} ({room}) imports {n} ({room_of(n)})" for n in names if not is_allowed(n, room)]


def modules() -> list[tuple[Path, str, bool]]:
    paths = [p for top in ("reason_rl", "kernels") for p in sorted((ROOT / top).rglob("*.py"))]
    paths += ROOT.glob("train.py")
    named = [(p, p.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")) for p in paths]
    return [(p, name.removesuffix(".__init__"), name.endswith(".__init__")) for p, name in named]


def test_no_import_leaves_the_arrows():
    found = [v for path, name, is_package in modules() for v in violations(path.read_text(encoding="utf-8"), name, is_package)]
    assert not found, "\n".join(found)


def test_every_module_belongs_to_a_room_and_every_room_has_a_module():
    seen = {room_of(name) for _, name, _ in modules()} - {"reason_rl"}
    assert seen <= set(LEVEL_OF), f"modules without a room: {sorted(seen - set(LEVEL_OF))}"
    assert set(LEVEL_OF) - seen <= {"thinking"}, f"rooms without a module: {sorted(set(LEVEL_OF) - seen)}"


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one circle of imports, or none."""
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> list[str]:
        if module in path:
            return path[path.index(module):]
        if module in done:
            return []
        for target in sorted(graph[module]):
            if found := walk(target, [*path, module]):
                return found
        done.add(module)
        return []

    return next((found for module in graph if (found := walk(module, []))), [])


def import_graph() -> dict[str, set[str]]:
    """Module -> our modules that are imported with it. A package's __init__ counts as the package."""
    known = {name for _, name, _ in modules()}
    graph = {}
    for path, name, is_package in modules():
        names = imports_of(path.read_text(encoding="utf-8"), name, is_package, top_level=True)
        targets = {n if n in known else n.rpartition(".")[0] for n in names}
        graph[name] = (targets & known) - {name}
    return graph


def test_imports_form_no_circle():
    assert not (found := circle(import_graph())), " -> ".join([*found, found[0]])


def test_a_planted_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == ["b", "c"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def named_in_strings(source: str) -> list[str]:
    """String constants that are the name of a module of ours, or of something in one."""
    strings = (node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant) and isinstance(node.value, str))
    return [text for text in strings if re.fullmatch(r"(reason_rl|kernels)(\.\w+)+(:\w+)?", text)]


def test_no_module_of_ours_is_named_in_a_string():
    """Such a name escapes this table, every reader's search, and every renaming. Users' modules are named in the config."""
    found = [f"{name}: {text!r}" for path, name, _ in modules() if room_of(name) != "config"
             for text in named_in_strings(path.read_text(encoding="utf-8"))]
    assert not found, "\n".join(found)


def test_a_planted_name_in_a_string_is_found():
    assert named_in_strings('f("reason_rl.answers.math:grade"); """reason_rl.eval says so."""') == ["reason_rl.answers.math:grade"]


def test_no_file_is_named_triton():
    assert not list((ROOT / "kernels").rglob("triton.py")) and not list((ROOT / "reason_rl").rglob("triton.py"))


def test_there_is_no_package_under_tests():
    assert not list((ROOT / "tests").rglob("__init__.py")), "it would hide the package of the same name"


@pytest.mark.parametrize(("source", "module"), [
    ("import reason_rl.records", "kernels.moe"),
    ("import numpy", "kernels.moe.reference"),
    ("from reason_rl import stages", "reason_rl.trainer.update"),
    ("from ..stages import grpo", "reason_rl.trainer.update"),
    ("from reason_rl.engine.blocks import Pool", "reason_rl.rl.packing"),
    ("from reason_rl.parallel.world import World", "reason_rl.engine.engine"),
    ("def late():\n    import reason_rl.trainer", "reason_rl.engine.engine"),
    ("import importlib\nimportlib.import_module('reason_rl.reward')", "reason_rl.data.tasks"),
    ("import kernels", "reason_rl.data.tasks"),
    ("import kernels.grpo_loss", "reason_rl.config"),
    ("from kernels.grpo_loss.reference import loss", "reason_rl.config"),
    ("from kernels.grpo_loss.spectral import x", "reason_rl.config"),
    ("import numpy", "reason_rl.records"),
    ("import reason_rl.reward.grade", "reason_rl.sandbox.jail"),
    ("import reason_rl.run.loop", "reason_rl.stages.grpo"),
    ("import train", "reason_rl.run.loop"),
    ("import reason_rl.records", "reason_rl"),
    ("from transformers import AutoModel", "reason_rl.model.weights"),
    ("import transformers.models", "reason_rl.serve.cli"),
    ("import transformers", "train"),
])  # fmt: skip
def test_a_planted_import_is_caught(source: str, module: str):
    assert len(violations(source, module, is_package=module == "reason_rl")) == 1


@pytest.mark.parametrize(("source", "module"), [
    ("import torch, math\nfrom kernels.dispatch import Op\nfrom . import reference", "kernels.moe.inner"),
    ("from kernels.grpo_loss.spec import LossSpec\nimport types", "reason_rl.config.schema"),
    ("from kernels.grpo_loss import spec", "reason_rl.config"),
    ("import numpy\nfrom reason_rl.records import Problem\nfrom ..config import Config", "reason_rl.data.tasks"),
    ("from reason_rl import __version__, rl\nimport kernels.moe, rich", "reason_rl.trainer.update"),
    ("import reason_rl.engine, reason_rl.trainer, reason_rl.reward, kernels", "reason_rl.stages.grpo"),
    ("from reason_rl.engine import Engine", "train"),
])  # fmt: skip
def test_an_arrow_of_the_table_passes(source: str, module: str):
    assert violations(source, module) == []


def test_a_relative_import_in_a_packages_init_is_resolved_from_the_package():
    assert violations("from .reference import x", "kernels.moe", is_package=True) == []
    assert violations("from ..engine import x", "reason_rl.rl", is_package=True) == [
        "reason_rl.rl (rl) imports reason_rl.engine.x (engine)"
    ]
