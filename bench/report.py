"""What a step costs here, against every other RAdam and Adam: `python -m bench report`.

About two minutes on 2 otherwise idle cores; --full takes larger sizes, more models and more
optimizers, --device cuda what is meant for a GPU. Leaves results.json, results.csv and three
pictures in a folder. No RAdam is timed before its step agrees with the formula in float64. Ctrl-C
keeps what was measured.
"""

import argparse
import gc
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
from .optimizers import CPU, CUDA, TRITON, Optimizer, select
from .results import FILE, SCHEMA, cpu_name, facts, frame, kept, results_folder, write
from .timing import DeviceLostError, Row, describe

KINDS = {"step": timing.measure, "training": training.measure, "memory": memory.measure}
SECONDS = {"quick": 1.0, "full": 5.0, "gpu": 4.0}  # for a case
LEVELS = {"quick": 1, "full": 2, "gpu": 2}  # of optimizers
LEGEND = """
a step: the median; p20 and p80 hold the middle three fifths. GB/s: of the bytes that the algorithm
must move. of limit: of what a loop (on a GPU, a copy) reaches that only moves as many bytes, on the
same tensors and threads. x Adam and x RAdam: how many times as fast as torch.optim.Adam(fused=True)
and torch.optim.RAdam(foreach=True). extra: memory beyond parameters, gradients and moments.
(!) other processes were at work meanwhile: measure it again.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m bench report", description=__doc__.partition(":")[0]
    )
    parser.add_argument("--full", action="store_true", help="all there is: some 15 minutes")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, help="folder (radam_report, or bench/results/<device>)")
    parser.add_argument("--only", default="", metavar="REGEX", help="of the cases' names")
    parser.add_argument("--seconds", type=float, help=f"for a case ({SECONDS})")
    parser.add_argument("--minutes", type=float, default=math.inf, help="in all")
    parser.add_argument("--resume", action="store_true", help="keep what the folder has")
    parser.add_argument("--dry-run", action="store_true", help="a GPU's path on the CPU, tiny")
    parser.add_argument("--once", metavar="CASE", help="one step of our kernels, for a profiler")
    args = parser.parse_args(arguments)
    deadline = time.monotonic() + 60 * args.minutes
    if args.device == "cuda" and not args.dry_run and not torch.cuda.is_available():
        print("torch finds no GPU; --dry-run tries the code without one", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    device = torch.device("cpu" if args.dry_run else args.device)
    gpu = args.dry_run or args.device == "cuda"
    which = "gpu" if gpu else "full" if args.full else "quick"
    chosen = [case for case in cases.select(which) if re.search(args.only, case.name)]
    if args.dry_run:
        chosen = [case.tiny() for case in chosen]
    if args.once:
        chosen = [case for case in chosen if case.name == args.once]
        return once(chosen[0], device) if chosen else parser.error(f"--once: no case {args.once!r}")
    file = (args.out or _folder(which, args.dry_run)) / FILE
    seconds = SECONDS[which] if args.seconds is None else args.seconds
    results = run(chosen, device, file, which, seconds, deadline, args.resume, args.dry_run)
    table = frame(results)
    for line in summary(results):
        print(line)
    table.to_csv(file.with_suffix(".csv"), index=False)
    for picture in plots.draw(results, file.parent):
        print(picture)
    wrong = any(row["status"] == WRONG for row in results["rows"])
    return 130 if results["interrupted"] else int(wrong)


def _folder(which: str, dry_run: bool) -> Path:
    if dry_run or which == "quick":
        return Path("radam_report")
    return results_folder(cpu_name() if which == "full" else torch.cuda.get_device_name())


def run(
    chosen: Sequence[Case],
    device: torch.device,
    file: Path,
    which: str,
    seconds: float,
    deadline: float = math.inf,
    resume: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Measures the cases in turn; writes the file and prints a table after each."""
    head = {"schema": SCHEMA, "set": which, "dry_run": dry_run, **facts(device)}
    rows = kept(file, head) if resume else []
    results = {**head, "interrupted": True, "rows": rows}
    there = {row["case"] for row in rows}
    refused: dict[torch.dtype, dict[str, Row]] = {}
    lost = ""
    gc.collect()
    gc.freeze()  # what exists now stays: collecting the optimizers of each turn is quick then
    try:
        for case in chosen:
            if case.name in there:
                continue
            rows_of = select(case.dtype, "cuda" if which == "gpu" else "cpu", LEVELS[which])
            if case.dtype not in refused and not lost:
                refused[case.dtype] = refusals(rows_of, device, case.dtype, deadline)
            try:
                found = [] if lost else KINDS[case.kind](
                    case, rows_of, device, seconds=seconds, deadline=deadline,
                    refused=refused[case.dtype], dry_run=dry_run,
                )  # fmt: skip
            except DeviceLostError as error:
                lost = str(error)
            if lost:
                found = [_lost(case, optimizer, lost) for optimizer in rows_of]
            rows += found
            write(file, results)
            disturbed = "  (!)" * any(map(tables.is_disturbed, found))
            print(f"\n{case.name}{disturbed}\n{tables.case_table(found)}", flush=True)
        results["interrupted"] = False
    except KeyboardInterrupt:
        print("\ninterrupted: this is not all")
    gc.unfreeze()
    write(file, results)
    return results


def _lost(case: Case, optimizer: Optimizer, reason: str) -> Row:
    row = {**describe(case), "optimizer": optimizer.name}
    return {**row, "status": NOT_MEASURED, "reason": reason}


def summary(results: dict[str, Any]) -> list[str]:
    """What is said after the cases."""
    table = frame(results)
    ours = "cuda" if results["set"] == "gpu" else "cpu"
    lines = [LEGEND, tables.machine(results), "", tables.growth_table(table), ""]
    lines.append("goals" + " (a dry run: these say nothing)" * results["dry_run"])
    lines += [f"  {title}: {said}" for title, said in goals.verdicts(table, ours)]
    return [*lines, "", "left out", *(f"  {line}" for line in tables.left_out(table)), ""]


def once(case: Case, device: torch.device) -> int:
    """One step of each of our kernels between cudaProfilerStart and Stop."""
    params = case.make(device)
    for optimizer in select(case.dtype, "cuda", 0):
        if optimizer.name not in (CPU, CUDA, TRITON):
            continue
        session = optimizer.start(params)
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
        session.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
        moved = optimizer.traffic(case.dtype.itemsize) * case.elements
        print(f"{case.name}: one step of {optimizer.name}, {moved} bytes")
    return 0
