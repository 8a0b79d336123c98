"""What the harness uses of the other benchmarks, and the provenance of a run."""

from importlib.metadata import version
from pathlib import Path

import torch

from ...results import RESULTS as ALL_RESULTS
from ...results import facts
from ...results import insert as insert

RESULTS = ALL_RESULTS / "paper"
PAGE = Path(__file__).parents[1] / "README.md"


def run_provenance() -> dict[str, str]:
    """Date, commit, fingerprint of the sources and versions."""
    found = facts(torch.device("cpu"))
    versions = {name: version(name) for name in ("torch", "numpy", "scipy")}
    return {key: found[key] for key in ("date", "commit", "sources")} | versions
