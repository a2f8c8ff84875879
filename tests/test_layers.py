"""Who may know whom: every import in `reason_rl` and `kernels` follows an arrow of this table, and no other exists."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# room -> our own rooms it may import, beside itself. `config_checks`, `config_reward` and `config_task` are config's other files;
# modules that stand alone in reason_rl/ are commands and, like train.py, may import everything. `data` asks one file of reward's
# whether a row's right answer can be read: only verifiers know, and what none can read is left out wherever problems are listed.
ARROWS = {
    "kernels": set(),
    "types": set(),
    "config": {"kernels.grpo_loss.spec"},
    "data": {"types", "config", "reason_rl.answers.ground_truth"},
    "reward": {"types", "config"},
    "model": {"kernels", "types", "config"},
    "rl": {"kernels", "types", "config"},
    "engine": {"kernels", "model", "types", "config"},
    "trainer": {"kernels", "model", "rl", "types", "config"},
}
# What a room may import from outside; a room not named here may import anything but transformers. flash_attn is a peer, imported
# only inside the function that is asked for by that name.
OUTSIDE = {"kernels": {"torch", "triton", "flash_attn"}, "types": {"torch"}, "config": {"torch"}}


def room_of(module: str) -> str:
    """'reason_rl.rl.losses' -> 'rl', 'kernels.moe' -> 'kernels', 'numpy.linalg' -> 'numpy'."""
    first, *rest = module.split(".")
    if first != "reason_rl" or not rest:
        return first
    return "config" if rest[0] in ("config_checks", "config_reward", "config_task") else rest[0]


def imports_of(source: str, module: str, is_package: bool) -> Iterator[str]:
    """Dotted names, `from a import b` as 'a.b', relative ones made absolute, importlib's with a plain string too."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            yield from (".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            yield from (a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str))


def is_allowed(name: str, room: str) -> bool:
    top, target = name.split(".")[0], room_of(name)
    if top in sys.stdlib_module_names or name == "reason_rl.__version__":
        return True
    if top == "transformers" or room == "reason_rl":  # reason_rl/__init__.py: every room imports it, so it imports none
        return False
    if top not in ("reason_rl", "kernels"):
        return room not in OUTSIDE or top in OUTSIDE[room]
    arrows = ARROWS.get(room, {target}) | {room}
    return target in arrows or any(f"{name}.".startswith(f"{arrow}.") for arrow in arrows if "." in arrow)


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
    found = [v for path, name, is_package in modules() for v in violations(path.read_text(), name, is_package)]
    assert not found, "\n".join(found)


def test_every_room_of_the_table_exists():
    seen = {room_of(name) for _, name, _ in modules()}
    assert set(ARROWS) <= seen, f"no such room: {sorted(set(ARROWS) - seen)}"


def test_every_folder_of_reason_rl_is_a_room_of_the_table():
    folders = {name.split(".")[1] for _, name, _ in modules() if name.startswith("reason_rl.") and name.count(".") > 1}
    assert folders <= set(ARROWS), f"not in the table: {sorted(folders - set(ARROWS))}"


def test_no_file_is_named_triton():
    assert not list((ROOT / "kernels").rglob("triton.py")) and not list((ROOT / "reason_rl").rglob("triton.py"))


def test_there_is_no_package_under_tests():
    assert not list((ROOT / "tests").rglob("__init__.py")), "it would shadow the package of the same name"


@pytest.mark.parametrize(("source", "module"), [
    ("import reason_rl.records", "kernels.moe"),
    ("import numpy", "kernels.moe.reference"),
    ("from reason_rl import engine", "reason_rl.trainer.update"),
    ("from ..engine import blocks", "reason_rl.trainer.update"),
    ("from reason_rl.engine.blocks import Pool", "reason_rl.rl.packing"),
    ("def late():\n    import reason_rl.trainer", "reason_rl.engine.engine"),
    ("import importlib\nimportlib.import_module('reason_rl.reward')", "reason_rl.data.tasks"),
    ("import kernels", "reason_rl.data.tasks"),
    ("import kernels.grpo_loss", "reason_rl.config"),
    ("from kernels.grpo_loss.reference import loss", "reason_rl.config"),
    ("from reason_rl.records import Problem", "reason_rl.config"),
    ("from kernels.grpo_loss.spectral import x", "reason_rl.config"),
    ("import numpy", "reason_rl.records"),
    ("import reason_rl.serve.cli", "reason_rl.engine.engine"),
    ("import reason_rl.records", "reason_rl"),
    ("from transformers import AutoModel", "reason_rl.model.weights"),
    ("import transformers.models", "reason_rl.serve.cli"),
    ("import transformers", "train"),
])  # fmt: skip
def test_a_planted_import_is_caught(source: str, module: str):
    assert len(violations(source, module, is_package=module == "reason_rl")) == 1


@pytest.mark.parametrize(("source", "module"), [
    ("import torch, math\nfrom kernels.dispatch import Op\nfrom . import reference", "kernels.moe.inner"),
    ("from kernels.grpo_loss.spec import LossSpec\nimport types", "reason_rl.config"),
    ("from reason_rl.config.checks import ConfigError", "reason_rl.config"),
    ("from kernels.grpo_loss import spec", "reason_rl.config"),
    ("import numpy\nfrom reason_rl.records import Problem\nfrom ..config import Config", "reason_rl.data.tasks"),
    ("from reason_rl import __version__, rl\nimport kernels.moe, rich", "reason_rl.trainer.update"),
    ("import reason_rl.engine, reason_rl.trainer, reason_rl.reward, kernels", "reason_rl.serve.cli"),
    ("from reason_rl.engine import Engine", "train"),
])  # fmt: skip
def test_an_arrow_of_the_table_passes(source: str, module: str):
    assert violations(source, module) == []


def test_a_relative_import_in_a_packages_init_is_resolved_from_the_package():
    assert violations("from .reference import x", "kernels.moe", is_package=True) == []
    assert violations("from ..engine import x", "reason_rl.rl", is_package=True) == [
        "reason_rl.rl (rl) imports reason_rl.engine.x (engine)"
    ]
