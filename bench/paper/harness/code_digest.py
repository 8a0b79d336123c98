"""A digest of the code that a function depends on: a kept result with another digest is stale."""

import ast
import hashlib
import sys
from collections.abc import Callable
from functools import cache
from importlib.util import resolve_name
from pathlib import Path
from typing import Any

from radam_kernels.fingerprint import _tree as syntax

Place = tuple[str, str]  # a module and a name at its top level


@cache
def code_digest(function: Callable[..., Any]) -> str:
    """Twelve hexadecimal digits for `function` and all code of its package that it names.

    Names are resolved through the top-level definitions of a module and through relative imports.
    Comments, docstrings, libraries (radam_kernels among them) and code that the function does not
    name, such as that of a figure, do not count.
    """
    definitions = cache(_definitions)
    pending: list[Place] = [(function.__module__, function.__name__)]
    found: dict[Place, str] = {}
    while pending:
        place = module, name = pending.pop()
        node = definitions(module).get(name)
        if place in found or node is None:
            continue
        if isinstance(node, ast.stmt):
            found[place] = " ".join(syntax(node))
            pending += [(module, n.id) for n in ast.walk(node) if isinstance(n, ast.Name)]
        else:
            found[place] = ""
            pending += node
    code = "\n".join(f"{place}: {text}" for place, text in sorted(found.items()))
    return hashlib.sha256(code.encode()).hexdigest()[:12]


def _definitions(module: str) -> dict[str, ast.stmt | list[Place]]:
    """What each top-level name of a module is: a definition, or places in other modules.

    An imported name has one place; an imported module has those of all its names.
    """
    package = sys.modules[module].__package__
    found: dict[str, ast.stmt | list[Place]] = {}
    for node in ast.parse(Path(sys.modules[module].__file__).read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = (n for target in targets for n in ast.walk(target) if isinstance(n, ast.Name))
            found |= {n.id: node for n in names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            origin = resolve_name("." * node.level + (node.module or ""), package).rstrip(".")
            for alias in node.names:
                places = [(origin, alias.name)]
                if (submodule := f"{origin}.{alias.name}") in sys.modules:
                    places = [(submodule, name) for name in _definitions(submodule)]
                found[alias.asname or alias.name] = places
    return found
