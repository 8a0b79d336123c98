"""Fingerprints of the sources, recorded in compiled modules and in measurements.

Comments, docstrings and layout are ignored, so changing them makes no build or measurement stale.
"""

import ast
import hashlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

COMMANDS = ("__main__.py", "doctor.py", "train.py", "train_report.py")  # no part of a step

# Literals are matched first, so that "//" inside one is kept.
_CPP = re.compile(r'("(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])+\')|//[^\n]*|/\*.*?\*/', re.DOTALL)


def fingerprint(root: Path) -> str | None:
    """Twelve hexadecimal digits for the sources under `root`/csrc; None if there are none."""
    return _digest(root, _compiled(root))


def measured_fingerprint(root: Path) -> str | None:
    """The same for everything that affects the speed of a step: also the package's Python files."""
    python = (file for file in (root / "radam_kernels").rglob("*.py") if file.name not in COMMANDS)
    return _digest(root, [*_compiled(root), *python])


def _compiled(root: Path) -> list[Path]:
    return list((root / "csrc").rglob("*.[ch]*"))


def _digest(root: Path, files: list[Path]) -> str | None:
    if not files:
        return None
    digest = hashlib.sha256()
    for file in sorted(files):
        text = file.read_text()
        code = " ".join(_tree(ast.parse(text))) if file.suffix == ".py" else _cpp(text)
        digest.update(f"{file.relative_to(root).as_posix()}\0{code}\0".encode())
    return digest.hexdigest()[:12]


def _cpp(text: str) -> str:
    """The text without comments, and with runs of whitespace replaced by one space."""
    return " ".join(_CPP.sub(lambda found: found[1] or " ", text).split())


def _tree(node: object) -> Iterator[str]:
    """A syntax tree as tokens that are the same in every version of Python."""
    if isinstance(node, list):
        for child in node:
            yield from _tree(child)
    elif isinstance(node, ast.AST):
        yield f"({type(node).__name__}"
        for name, value in ast.iter_fields(node):
            if name == "body" and isinstance(value, list):
                value = [child for child in value if not _is_docstring(child)]
            if value is not None and value != []:  # versions of Python differ in these
                yield name
                yield from _tree(value)
        yield ")"
    else:
        yield repr(node)


def _is_docstring(node: ast.AST) -> bool:
    """Whether this is a statement that consists of a string."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


if __name__ == "__main__":  # called by the build
    print(fingerprint(Path(sys.argv[1])))
