"""Turns kept runs into tables, figures and verdicts, and puts published ones on the page."""

import json
import shutil
from collections.abc import Iterable, Sequence
from operator import methodcaller
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib import rc_context

from . import plots
from .experiment import Experiment, Verdict
from .provenance import Site, insert
from .runner import Kept, read_kept

WORDS = {True: "supported", False: "not supported", None: "cannot tell"}


def report(experiment: Experiment, kept: Path, out: Path, *, quick: bool) -> list[Verdict]:
    """Writes NAME.csv, NAME.png and NAME.json into `out`; all runs must be in `kept`."""
    results = [read_kept(kept, experiment, run) for run in experiment.runs(quick)]
    rows = pd.DataFrame([row for result in results for row in result.rows])
    verdicts = experiment.judge(rows, quick)
    origin = provenance(experiment, results, quick)
    out.mkdir(parents=True, exist_ok=True)
    head = "".join(f"# {key}: {value}\n" for key, value in origin.items())
    table = rows.to_csv(index=False, float_format="%.7g")
    (out / f"{experiment.name}.csv").write_text(head + table)
    with rc_context(plots.STYLE):
        # Without the version of matplotlib, which would change the file at each upgrade.
        experiment.draw(rows).savefig(out / f"{experiment.name}.png", metadata={"Software": None})
    result = {"verdicts": [verdict._asdict() for verdict in verdicts], "provenance": origin}
    if experiment.table:
        result["table"] = markdown(experiment.table(rows))
    text = json.dumps(result, indent=1, default=methodcaller("item"))  # NumPy scalars
    (out / f"{experiment.name}.json").write_text(text + "\n")
    return verdicts


def provenance(experiment: Experiment, results: Sequence[Kept], quick: bool) -> dict[str, Any]:
    """How the rows were made; if runs differ in date, commit or versions, all are listed."""
    origin: dict[str, Any] = {
        "experiment": experiment.name,
        "mode": "quick" if quick else "full",
        "runs": len(results),
        "seconds of one thread": round(sum(result.seconds for result in results), 1),
    }
    for key in results[0].provenance:
        origin[key] = ", ".join(sorted({result.provenance[key] for result in results}))
    return origin


def markdown(table: pd.DataFrame) -> list[str]:
    """The lines of a Markdown table; numbers have four significant digits."""

    def cell(value: object) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = [list(map(str, table.columns)), ["---"] * len(table.columns)]
    lines += [list(map(cell, row)) for row in table.itertuples(index=False)]
    return [f"| {' | '.join(line)} |" for line in lines]


def publish(experiment: Experiment, out: Path, site: Site) -> None:
    """Copies an experiment's full results from `out` to the published ones."""
    site.results.mkdir(parents=True, exist_ok=True)
    for suffix in ("csv", "png", "json"):
        shutil.copy(out / f"{experiment.name}.{suffix}", site.results)


def update_page(experiments: Iterable[Experiment], site: Site) -> None:
    """Writes the published results of all experiments that have some to the page."""
    text = site.page.read_text()
    for experiment in experiments:
        if (site.results / f"{experiment.name}.json").exists():
            text = insert(text, experiment.name, page_part(experiment, site))
    site.page.write_text(text)


def page_part(experiment: Experiment, site: Site) -> str:
    """What the page shows of an experiment: claim, published verdicts, figure and table."""
    result = json.loads((site.results / f"{experiment.name}.json").read_text())
    verdicts = [Verdict(**verdict) for verdict in result["verdicts"]]
    parts = [
        f"**Claim.** {experiment.claim}",
        f"**Our result** ({result['provenance']['runs']} runs, full mode):",
        "\n".join(f"- **{WORDS[supported]}**: {words}" for supported, words in verdicts),
        f"![{experiment.title}](../results/{site.results.name}/{experiment.name}.png)",
    ]
    if "table" in result:
        parts.append("\n".join(result["table"]))
    return "\n\n".join(parts)
