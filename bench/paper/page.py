"""Puts the committed results on the page: figures, claims and verdicts, between its markers."""

import json
from collections.abc import Iterable
from pathlib import Path

from ..folders import RESULTS as ALL_RESULTS
from ..markers import insert
from .experiment import Experiment, Verdict
from .report import words

RESULTS = ALL_RESULTS / "paper"
PAGE = Path(__file__).with_name("README.md")


def write(experiments: Iterable[Experiment]) -> None:
    """Renews the part of each experiment that has a committed result."""
    text = PAGE.read_text()
    for experiment in experiments:
        if (RESULTS / f"{experiment.name}.json").exists():
            text = insert(text, experiment.name, part(experiment))
    PAGE.write_text(text)


def part(experiment: Experiment) -> str:
    """What the page shows of an experiment: claim, verdicts and figure."""
    said = json.loads((RESULTS / f"{experiment.name}.json").read_text())
    verdicts = [Verdict(**verdict) for verdict in said["verdicts"]]
    figure = f"../results/paper/{experiment.name}.png"
    parts = [
        f"**Claim.** {experiment.claim}",
        f"**Our result** ({said['provenance']['runs']} runs, full mode):",
        words(verdicts),
        f"![{experiment.title}]({figure})",
    ]
    if "table" in said:
        parts.append("\n".join(said["table"]))
    return "\n\n".join(parts)
