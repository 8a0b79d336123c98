"""Names the test files that need a package which is not here: pytest can leave them out then."""

import ast
import sys
from importlib.util import find_spec
from pathlib import Path


def missing(file: Path) -> str | None:
    """The first package imported at the top of the file that is not installed."""
    for node in ast.parse(file.read_text()).body:
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module]
        for name in names:
            if find_spec(name.partition(".")[0]) is None:
                return name.partition(".")[0]
    return None


if __name__ == "__main__":
    for file in sorted(Path(sys.argv[1]).glob("test_*.py")):
        if package := missing(file):
            print(file, package)
