"""Fingerprints of the sources: compiled modules carry one, measurements another."""

import hashlib
import sys
from pathlib import Path

COMMANDS = ("__main__.py", "doctor.py", "train.py", "train_report.py")  # no part of a step


def fingerprint(root: Path) -> str | None:
    """Twelve hexadecimal digits for the sources under `root`/csrc; None where there are none."""
    return _digest({file.relative_to(root).as_posix(): file for file in _compiled(root)})


def measured_fingerprint(root: Path) -> str | None:
    """The same for all that decides a step's speed: those sources and the package's Python."""
    python = (file for file in (root / "radam_kernels").rglob("*.py") if file.name not in COMMANDS)
    files = [*_compiled(root), *python]
    return _digest({file.relative_to(root).as_posix(): file for file in files})


def _compiled(root: Path) -> list[Path]:
    return list((root / "csrc").rglob("*.[ch]*"))


def _digest(files: dict[str, Path]) -> str | None:
    if not files:
        return None
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(name.encode() + b"\0" + files[name].read_bytes())
    return digest.hexdigest()[:12]


if __name__ == "__main__":  # the build asks
    print(fingerprint(Path(sys.argv[1])))
