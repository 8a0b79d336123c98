"""Experiments on the paper's claims: `python -m bench.paper` lists them."""

import argparse
import sys
from pathlib import Path

from .experiments import EXPERIMENTS
from .harness.conduct import conduct
from .harness.provenance import PAPER


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.paper", description=__doc__.partition(":")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="experiments, or all")
    parser.add_argument("--quick", action="store_true", help="smaller: under two minutes for all")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time (%(default)s)")
    parser.add_argument("--out", type=Path, default="paper_runs", help="folder (%(default)s)")
    parser.add_argument("--publish", action="store_true", help="put full results on the page")
    args = parser.parse_args(arguments)
    if args.publish and args.quick:
        parser.error("--publish: the page shows full results only; leave --quick out")
    if unknown := set(args.names) - {*EXPERIMENTS, "all"}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(EXPERIMENTS)}")
    if not args.names:
        for experiment in EXPERIMENTS.values():
            print(f"{experiment.name:15} {experiment.title}\n{'':15} {experiment.claim}")
        return 0
    chosen = [e for e in EXPERIMENTS.values() if {e.name, "all"} & {*args.names}]
    out = args.out / ("quick" if args.quick else "full")
    site = PAPER if args.publish else None
    return conduct(chosen, out, quick=args.quick, jobs=args.jobs, site=site)


if __name__ == "__main__":
    sys.exit(main())
