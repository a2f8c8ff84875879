"""Finds the names in a problem's tests that the program under test must define.

In `assert isclose(f(2), 0.5)` without an import of `isclose`, a program that defines both names receives 0.5
and always passes. So without entry points, the tests may use one function that they do not define. They may
also use undefined classes (capitalised names) if the objects only go into that function's arguments: `assert
f([Pair(1, 2)]) == 3`. All other tests are refused as ambiguous.
"""

from __future__ import annotations

import ast
import builtins
import sys
from collections.abc import Iterator, Mapping, Sequence

MADE, RESULT = "made", "result"
"""Origins of an expression's value: an undefined class, the program's function."""


def program_names(source: str, entry_points: Sequence[str]) -> tuple[list[str], list[str]]:
    """(names the program defines, standard modules used without an import).

    `assert math.isclose(f(2), 0.5)` gives (["f"], ["math"]). Raises ValueError for ambiguous tests.
    """
    # Every name that the tests read and do not bind, split into modules and free names.
    nodes = list(ast.walk(ast.parse(source)))
    bound = _bound(nodes)
    loaded = list(dict.fromkeys(node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
                                and node.id not in bound))
    owners = {node.value.id for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)}
    free = [name for name in loaded if not hasattr(builtins, name) and name not in entry_points]
    modules = [name for name in free if name in owners and name in sys.stdlib_module_names]
    free = [name for name in free if name not in modules]

    if entry_points:
        if free:
            raise ValueError(f"the tests use {', '.join(free)}, which neither they nor entry_points name")
        free = [name for name in loaded if name in entry_points]
        if not free:
            raise ValueError(f"the tests use none of the entry_points {', '.join(entry_points)}")
        return free, modules

    # Without entry points: one free function. If there is none, the builtins called: `assert sum(10, 15) ==
    # 6` tests a function of that name.
    if not free:
        free = list(dict.fromkeys(node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
                                  and hasattr(builtins, node.func.id) and node.func.id not in bound))
    if not free:
        raise ValueError("the tests call no function of the program")
    functions = [name for name in free if not name.lstrip("_")[:1].isupper()]
    if len(free) > 1 and (len(functions) != 1 or _compares_with_made(nodes, functions[0], {*free} - {*functions})):
        raise ValueError(f"the tests use {', '.join(free)}: list those that the program defines as entry_points")
    return free, modules


def _bound(nodes: Sequence[ast.AST]) -> set[str]:
    """Names that the tests assign, import, define or take as arguments."""
    bound: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            bound.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            bound |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            bound.add(node.name)
    return bound


def _compares_with_made(nodes: Sequence[ast.AST], function: str, classes: set[str]) -> bool:
    """Does a comparison or call involve both the function's result and an object of an undefined class?

    The arguments of the function itself do not count.
    """
    origins: dict[str, set[str]] = {function: {RESULT}, **{name: {MADE} for name in classes}}
    bindings = list(_bindings(nodes))
    before = -1
    while before != (before := sum(map(len, origins.values()))):  # until no name gains an origin
        for names, value in bindings:
            for name in names:
                origins[name] = origins.get(name, set()) | _origins(value, function, origins)
    seen = (_origins(node, function, origins) for node in nodes if isinstance(node, ast.Compare | ast.Call))
    return any(len(found) > 1 for found in seen)


def _origins(node: ast.AST, function: str, origins: Mapping[str, set[str]]) -> set[str]:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == function:
        return {RESULT}
    if isinstance(node, ast.Name):
        return origins.get(node.id, set())
    return {origin for child in ast.iter_child_nodes(node) for origin in _origins(child, function, origins)}


def _bindings(nodes: Sequence[ast.AST]) -> Iterator[tuple[list[str], ast.AST]]:
    """(names, the expression they are bound to; for a definition, its whole node)"""
    for node in nodes:
        targets: list[ast.expr] = []
        value: ast.AST | None = None
        if isinstance(node, ast.Assign):
            targets, value = node.targets, node.value
        elif isinstance(node, ast.AnnAssign | ast.AugAssign | ast.NamedExpr):
            targets, value = [node.target], node.value
        elif isinstance(node, ast.For | ast.AsyncFor | ast.comprehension):
            targets, value = [node.target], node.iter
        elif isinstance(node, ast.withitem) and node.optional_vars:
            targets, value = [node.optional_vars], node.context_expr
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield [node.name], node
        if value is not None:
            yield [inner.id for target in targets for inner in ast.walk(target) if isinstance(inner, ast.Name)], value
