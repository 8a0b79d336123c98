"""The paper's claims, tried out: `python -m bench.paper` lists the experiments."""

import argparse
import shutil
import sys
from pathlib import Path

from . import page
from .experiments import EXPERIMENTS
from .report import WORDS, report
from .runner import do_missing


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.paper", description=__doc__.partition(":")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="experiments, or all")
    parser.add_argument("--quick", action="store_true", help="smaller: under two minutes for all")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time (%(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("paper_runs"), help="folder of results (%(default)s)"
    )
    parser.add_argument(
        "--publish", action="store_true", help="put full results where the page shows them"
    )
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
    try:
        failed = do_missing(chosen, out / "runs", quick=args.quick, jobs=args.jobs)
    except KeyboardInterrupt:
        print(f"interrupted; finished runs are kept in {out / 'runs'}", file=sys.stderr)
        return 130
    for experiment in chosen:
        print(f"\n{experiment.title}\n  claim: {experiment.claim}")
        if keys := failed.get(experiment.name):
            print(f"  no result: {len(keys)} runs failed: {', '.join(keys)}")
            continue
        for supported, words in report(experiment, out / "runs", out, quick=args.quick):
            print(f"  {WORDS[supported]}: {words}")
        if args.publish:
            page.RESULTS.mkdir(parents=True, exist_ok=True)
            for suffix in ("csv", "png", "json"):
                shutil.copy(out / f"{experiment.name}.{suffix}", page.RESULTS)
    if args.publish:
        page.write(EXPERIMENTS.values())
    print(f"\ntables and figures: {out}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
