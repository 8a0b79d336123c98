"""What a step costs here, against every other RAdam and Adam: `python -m bench report`.

About two minutes on 2 otherwise idle cores; --full takes larger sizes, more models and more
optimizers, --device cuda what is meant for a GPU. Leaves results.json, results.csv and three
pictures in a folder. No RAdam is timed before its step agrees with the formula in float64. Ctrl-C
keeps what was measured.
"""

import argparse
import math
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import cases, goals, memory, plots, tables, timing, training
from .cases import Case
from .correctness import NOT_MEASURED, WRONG, refusals
from .optimizers import select
from .results import FILE, SCHEMA, cpu_name, facts, frame, kept, results_folder, write
from .timing import OUT_OF_TIME, DeviceLostError, Row, describe

KINDS = {"step": timing.measure, "training": training.measure, "memory": memory.measure}
SECONDS = {"quick": 1.0, "full": 5.0, "gpu": 4.0}  # for a case
LEVELS = {"quick": 1, "full": 2, "gpu": 2}  # of optimizers


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m bench report", description=__doc__.split(":")[0])
    parser.add_argument("--full", action="store_true", help="all there is: some 15 minutes")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(%(default)s)")
    parser.add_argument("--out", type=Path, help="folder (radam_report, or bench/results/<device>)")
    parser.add_argument("--only", default="", metavar="REGEX", help="of the cases' names")
    parser.add_argument("--seconds", type=float, help="for a case (quick 1, full 5, GPU 4)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="in all")
    parser.add_argument("--resume", action="store_true", help="keep what the folder has")
    parser.add_argument("--dry-run", action="store_true", help="a GPU's path on the CPU, tiny")
    parser.add_argument("--once", metavar="CASE", help="one step of our kernels, for a profiler")
    args = parser.parse_args(arguments)
    gpu = args.dry_run or args.device == "cuda"
    if gpu and not args.dry_run and not torch.cuda.is_available():
        print("torch finds no GPU; --dry-run tries the code without one", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    device = torch.device("cpu" if args.dry_run else args.device)
    which = "gpu" if gpu else "full" if args.full else "quick"
    chosen = [case for case in cases.select(which) if re.search(args.only, case.name)]
    if args.dry_run:
        chosen = [case.tiny() for case in chosen]
        torch.set_num_threads(1)  # tiny steps on more wait long for each other on a busy machine
    if args.once:
        chosen = [case for case in chosen if case.name == args.once]
        return once(chosen[0], device) if chosen else parser.error(f"--once: no case {args.once!r}")
    folder = Path("radam_report")
    if which != "quick" and not args.dry_run:
        folder = results_folder(torch.cuda.get_device_name() if gpu else cpu_name())
    file = (args.out or folder) / FILE
    if args.seconds is None:
        args.seconds = 0 if args.dry_run else SECONDS[which]
    results = run(chosen, device, file, which, args)
    print(summary(results))
    frame(results).to_csv(file.with_suffix(".csv"), index=False)
    for picture in plots.draw(results, file.parent):
        print(picture)
    wrong = any(row["status"] == WRONG for row in results["rows"])
    return 130 if results["interrupted"] else int(wrong)


def run(
    chosen: Sequence[Case], device: torch.device, file: Path, which: str, args: argparse.Namespace
) -> dict[str, Any]:
    """Measures the cases in turn; writes the file and prints a table after each."""
    deadline = time.monotonic() + 60 * args.minutes
    head = {"schema": SCHEMA, "set": which, "dry_run": args.dry_run, **facts(device)}
    results = {**head, "interrupted": True, "rows": kept(file, head) if args.resume else []}
    there = {row["case"] for row in results["rows"]}
    refused: dict[torch.dtype, dict[str, Row]] = {}
    stop = ""  # why nothing more can be measured
    try:
        for case in chosen:
            if case.name in there:
                continue
            optimizers = select(
                case.dtype,
                "cuda" if which == "gpu" else "cpu",
                LEVELS[which],
                sharded=case.sharded,
            )
            if not stop and case.dtype not in refused:
                refused[case.dtype] = refusals(optimizers, device, case.dtype, deadline)
            if time.monotonic() > deadline:
                stop = stop or OUT_OF_TIME
            rows: list[Row] = []
            if not stop:
                try:
                    rows = KINDS[case.kind](
                        case,
                        optimizers,
                        device,
                        seconds=args.seconds,
                        deadline=deadline,
                        refused=refused[case.dtype],
                        dry_run=args.dry_run,
                    )
                except DeviceLostError as error:
                    stop = str(error)
            if stop:
                reason = {"status": NOT_MEASURED, "reason": stop}
                rows = [{**describe(case), "optimizer": row.name, **reason} for row in optimizers]
            results["rows"] += rows
            write(file, results)
            print(f"\n{tables.case_table(frame({'rows': rows}))}", flush=True)
        results["interrupted"] = False
    except KeyboardInterrupt:
        print("\ninterrupted: this is not all")
    write(file, results)
    return results


def summary(results: dict[str, Any]) -> str:
    """What is said after the cases."""
    table = frame(results)
    device = "cuda" if results["set"] == "gpu" else "cpu"
    aims = "Goals" + " (a dry run: these say nothing)" * results["dry_run"]
    parts = [
        tables.LEGEND,
        tables.machine(results),
        tables.growth_table(table),
        f"{aims}:\n{goals.lines(table, device)}",
        f"Left out:\n{tables.left_out(table)}",
    ]
    return "\n\n".join(part for part in parts if part)


def once(case: Case, device: torch.device) -> int:
    """One step of each of our kernels between cudaProfilerStart and Stop."""
    params = case.make(device)
    for row in select(case.dtype, "cuda", 0):
        if not row.backend or row.form:
            continue
        session = row.start(params)
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
        session.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
        moved = case.moved(row.traffic) * case.elements
        print(f"{case.name}: one step of {row.name}, {moved} bytes")
    return 0
