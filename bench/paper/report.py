"""Turns kept runs into a table with its provenance, a figure and a verdict."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from .experiment import Experiment, Verdict
from .runner import Kept, plain, read_kept

WORDS = {True: "supported", False: "not supported", None: "cannot tell"}


def report(experiment: Experiment, kept: Path, out: Path, *, quick: bool) -> list[Verdict]:
    """Writes NAME.csv, NAME.png and NAME.json into `out`, from runs that are all in `kept`."""
    runs = experiment.runs(quick)
    found = [read_kept(kept, experiment, run) for run in runs]
    rows = pd.DataFrame([row for one in found for row in one.rows])
    verdicts = experiment.judge(rows, quick)
    origin = provenance(experiment, found, quick)
    out.mkdir(parents=True, exist_ok=True)
    head = "".join(f"# {key}: {value}\n" for key, value in origin.items())
    (out / f"{experiment.name}.csv").write_text(
        head + rows.to_csv(index=False, float_format="%.7g")
    )
    # Without it, the file names matplotlib's version, and every upgrade changes the picture.
    experiment.draw(rows).savefig(out / f"{experiment.name}.png", metadata={"Software": None})
    said = {"verdicts": [verdict._asdict() for verdict in verdicts], "provenance": origin}
    if experiment.table:
        said["table"] = markdown(experiment.table(rows))
    (out / f"{experiment.name}.json").write_text(json.dumps(said, indent=1, default=plain) + "\n")
    return verdicts


def provenance(experiment: Experiment, found: Sequence[Kept], quick: bool) -> dict[str, Any]:
    """What the rows were made of and when; runs of several commits or sources are all named."""
    origin: dict[str, Any] = {
        "experiment": experiment.name,
        "mode": "quick" if quick else "full",
        "runs": len(found),
        "seconds of one thread": round(sum(one.seconds for one in found), 1),
    }
    for key in found[0].made:
        origin[key] = ", ".join(sorted({one.made[key] for one in found}))
    return origin


def markdown(table: pd.DataFrame) -> list[str]:
    """The lines of a table; numbers with four digits."""

    def cell(value: object) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = [list(map(str, table.columns)), ["---"] * len(table.columns)]
    lines += [list(map(cell, row)) for row in table.itertuples(index=False)]
    return [f"| {' | '.join(line)} |" for line in lines]


def words(verdicts: Sequence[Verdict]) -> str:
    """Verdicts as a markdown list."""
    return "\n".join(f"- **{WORDS[supported]}**: {text}" for supported, text in verdicts)
