"""What a command does: execute what is missing, report, and publish."""

import sys
from collections.abc import Sequence
from pathlib import Path

from .experiment import Experiment
from .provenance import Site
from .report import WORDS, publish, report, update_page
from .runner import execute_missing


def conduct(
    experiments: Sequence[Experiment], out: Path, *, quick: bool, jobs: int, site: Site | None
) -> int:
    """Prints verdicts, and publishes at `site`; returns an exit status."""
    try:
        failed = execute_missing(experiments, out / "runs", quick=quick, jobs=jobs)
    except KeyboardInterrupt:
        print(f"interrupted; finished runs are kept in {out / 'runs'}", file=sys.stderr)
        return 130
    for experiment in experiments:
        print(f"\n{experiment.title}\n  claim: {experiment.claim}")
        if keys := failed.get(experiment.name):
            print(f"  no result: {len(keys)} runs failed: {' '.join(keys)}")
            continue
        for supported, words in report(experiment, out / "runs", out, quick=quick):
            print(f"  {WORDS[supported]}: {words}")
        if site:
            publish(experiment, out, site)
    if site:
        update_page(experiments, site)
    print(f"\ntables and figures: {out}")
    return 1 if failed else 0
