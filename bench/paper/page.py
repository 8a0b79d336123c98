"""Puts the committed results on the page: figures, claims and verdicts, between its markers."""

import json
from collections.abc import Iterable
from pathlib import Path

from ..folders import RESULTS as ALL_RESULTS
from .experiment import Experiment, Verdict
from .report import words

RESULTS = ALL_RESULTS / "paper"
PAGE = Path(__file__).with_name("README.md")


def write(experiments: Iterable[Experiment]) -> None:
    """Renews the part of each experiment that has a committed result."""
    text = PAGE.read_text()
    for experiment in experiments:
        if (RESULTS / f"{experiment.name}.json").exists():
            text = insert(text, experiment)
    PAGE.write_text(text)


def insert(text: str, experiment: Experiment) -> str:
    """The page with an experiment's part between its markers, which must be there."""
    begin, end = (f"<!-- {experiment.name}:{mark} -->" for mark in ("begin", "end"))
    before, found, rest = text.partition(begin)
    _, found_too, after = rest.partition(end)
    if not found or not found_too:
        raise ValueError(f"{PAGE}: expected the lines {begin} and {end}; put them there")
    return f"{before}{begin}\n{part(experiment)}\n{end}{after}"


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
