"""What the harness uses of the other benchmarks, and the provenance of a run."""

from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch

from ...results import RESULTS, facts
from ...results import insert as insert


class Site(NamedTuple):
    """Where results are published: a folder, and a page with markers for each experiment."""

    results: Path
    page: Path


PAPER = Site(RESULTS / "paper", Path(__file__).parents[1] / "README.md")


def run_provenance() -> dict[str, str]:
    """Date, commit, fingerprint of the sources and versions."""
    found = facts(torch.device("cpu"))
    versions = {name: version(name) for name in ("torch", "numpy", "scipy")}
    return {key: found[key] for key in ("date", "commit", "sources")} | versions
