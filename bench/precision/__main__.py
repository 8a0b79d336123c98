"""What the formats for low memory cost in precision: `python -m bench.precision`.

Under two minutes on 2 otherwise idle cores; --full takes more trainings and seeds, and memory.
"""

import argparse
import sys
from pathlib import Path

import pandas as pd

from ..paper.harness.conduct import conduct
from ..paper.harness.experiment import Experiment
from ..paper.harness.provenance import Site, insert
from ..paper.harness.report import markdown
from ..results import RESULTS, ROOT
from . import fidelity, memory, stall, trainings

EXPERIMENTS = {
    experiment.name: experiment
    for experiment in map(Experiment.from_module, (fidelity, stall, trainings, memory))
}
SITE = Site(RESULTS / "precision", Path(__file__).parent / "README.md")
PROJECT = ROOT / "README.md"
MARKER = "precision"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("bench.precision", description=__doc__.partition(":")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(EXPERIMENTS)}")
    parser.add_argument("--full", action="store_true", help="all there is: under 40 minutes")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time (%(default)s)")
    parser.add_argument("--out", type=Path, default="precision_runs", help="folder (%(default)s)")
    parser.add_argument("--publish", action="store_true", help="put full results on the page")
    args = parser.parse_args(arguments)
    if args.publish and not args.full:
        parser.error("--publish: the page shows full results only; add --full")
    if unknown := set(args.names) - {*EXPERIMENTS}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(EXPERIMENTS)}")
    chosen = [e for e in EXPERIMENTS.values() if e.name in (args.names or EXPERIMENTS)]
    if not args.full:
        chosen = [experiment for experiment in chosen if experiment.runs(True)]
    out = args.out / ("full" if args.full else "quick")
    site = SITE if args.publish else None
    status = conduct(chosen, out, quick=not args.full, jobs=args.jobs, site=site)
    if site:
        for page in (SITE.page, PROJECT):
            if f"<!-- {MARKER}:begin -->" in page.read_text():
                page.write_text(insert(page.read_text(), MARKER, summary()))
    return status


def summary() -> str:
    """The table for the project's README, of the published trainings."""
    rows = pd.read_csv(SITE.results / "trainings.csv", comment="#")
    return "\n".join(markdown(trainings.summary(rows)))


if __name__ == "__main__":
    sys.exit(main())
