"""A digest of the code that a function reaches, by which a kept result is known to be stale."""

import ast
import hashlib
import inspect
import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

Definitions = dict[str, ast.stmt]


class Import(NamedTuple):
    """Where a name comes from: a module, and the name there; None for the module itself."""

    module: str
    name: str | None


@cache
def code_digest(function: Callable[..., Any]) -> str:
    """Twelve hexadecimal digits for `function` and all it names, as far as its package goes.

    Followed by name through the definitions at the top of its module, and through relative imports
    (`from .x import y`) to those of others. Comments, docstrings and code that it does not name,
    such as that of a figure, do not count; nor do libraries, radam_kernels among them.
    """
    top = cache(_top)
    pending, reached = [(function.__module__, function.__name__)], {}
    while pending:
        place = pending.pop()
        module, name = place
        if place in reached:
            continue
        definitions, imports = top(module)
        if origin := imports.get(name):
            names = [origin.name] if origin.name else top(origin.module)[0]
            pending += [(origin.module, found) for found in names]
            reached[place] = ""
        elif node := definitions.get(name):
            names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
            pending += [(module, found) for found in names]
            reached[place] = _code(node)
    code = "\n".join(f"{place}: {text}" for place, text in sorted(reached.items()))
    return hashlib.sha256(code.encode()).hexdigest()[:12]


def _code(node: ast.stmt) -> str:
    """Without comments, layout and docstrings."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(inner):
            del inner.body[0]
    return ast.unparse(node)


def _top(module: str) -> tuple[Definitions, dict[str, Import]]:
    """What a module defines at its top, and what it takes from its own package."""
    package = sys.modules[module].__package__ or ""
    definitions: Definitions = {}
    imports: dict[str, Import] = {}
    for node in ast.parse(inspect.getsource(import_module(module))).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            definitions[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                for n in ast.walk(target):
                    if isinstance(n, ast.Name):
                        definitions[n.id] = node
        elif isinstance(node, ast.ImportFrom) and node.level == 1:
            for alias in node.names:
                origin = (
                    Import(f"{package}.{node.module}", alias.name)
                    if node.module
                    else Import(f"{package}.{alias.name}", None)
                )
                imports[alias.asname or alias.name] = origin
    return definitions, imports
