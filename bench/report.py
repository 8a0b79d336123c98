"""What a step costs on this CPU, against every other RAdam and Adam: `python -m bench.report`.

About two minutes on 2 otherwise idle cores; --full takes larger sizes, more models and more
optimizers. Leaves a table on the screen, and report.json, report.csv and three pictures in a
folder. The optimizers of a case take turns, and no RAdam is timed before its step agrees with the
formula in float64. Ctrl-C keeps what was measured. For a GPU there is bench/gpu_report.sh.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import machine
from .cases import DTYPES, Case, Setting, all_cases
from .contenders import QUICK, REFERENCE, TRITON, Contender, everyone
from .folders import results_folder
from .gpu_time import fault, write
from .peak import STATUS, Point, extra_bytes
from .report_files import draw, write_csv
from .report_lines import table
from .rounds import DEVICE, measure
from .turns import Row

SCHEMA = 1
FILE = "report.json"
FULL_ONLY = {"one_256M", "Llama-3-2-1B", "ViT-B-16", "BERT-base"}  # float32
HALF = {False: ("one_64M",), True: ("one_1M", "one_64M", "one_256M", "ResNet-50", "GPT-2-124M")}
SLOW = 1 << 25  # elements; beyond it only what tells most has time and room
NO_SPEED = (REFERENCE, TRITON)  # with all that begin so: for reading, and interpreted
# Elements, tensors. What malloc keeps of blocks below 32 MB, which it need not map, is chance.
MEMORY = [(1 << 24, 1), (1 << 25, 1), (64, 1000), (64, 10_000)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--full", action="store_true", help="all there is: some 12 minutes")
    parser.add_argument(
        "--out", type=Path, help="folder (radam_report; with --full bench/results/<CPU>)"
    )
    parser.add_argument("--only", default="", metavar="REGEX", help="of the cases, and 'memory'")
    parser.add_argument("--seconds", type=float, help="for a case (1; with --full 5)")
    parser.add_argument("--draw", action="store_true", help="what the folder has; time nothing")
    args = parser.parse_args(arguments)
    default = results_folder(machine.cpu_name()) if args.full else Path("radam_report")
    file = (args.out or default) / FILE
    if args.draw:
        results = json.loads(file.read_text())
    else:
        torch.manual_seed(0)
        chosen = [s for s in settings(args.full) if re.search(args.only, s.name)]
        seconds = args.seconds if args.seconds is not None else 5 if args.full else 1
        results = run(chosen, file, args.full, seconds, bool(re.search(args.only, "memory")))
    print("\n".join(table(results)))
    write_csv(results, file.with_suffix(".csv"))
    for picture in draw(results, file.parent):
        print(picture)
    rows = [row for case in results["cases"].values() for row in case["rows"].values()]
    return 130 if results["interrupted"] else int(any("wrong" in row for row in rows))


def settings(full: bool) -> Iterator[Setting]:
    """What is measured, in order."""
    float32, bfloat16 = (all_cases(dtype) for dtype in DTYPES)
    for key, case in float32.items():
        if full or key not in FULL_ONLY:
            yield Setting(case)
        if key == "1000_of_64":
            yield Setting(case, new_gradients=True)
            yield Setting(case, new_gradients=True, cold=True)
    yield from (Setting(bfloat16[key]) for key in HALF[full])


def competitors(dtype: torch.dtype, full: bool) -> list[Contender]:
    everybody = [c for c in everyone(dtype, "cpu") if not c.name.startswith(NO_SPEED)]
    return [c for c in everybody if full or c.make is None or c.name in QUICK]


def run(
    chosen: Sequence[Setting], file: Path, full: bool, seconds: float, memory: bool
) -> dict[str, Any]:
    """Measures the settings, then memory; writes the file after each. Ctrl-C ends it early."""
    results: dict[str, Any] = {
        "schema": SCHEMA,
        "set": "full" if full else "quick",
        **machine.facts(DEVICE),
        "interrupted": True,  # until all is measured
        "cases": {},
        "memory": {},
    }
    peers = {dtype: competitors(dtype, full) for dtype in DTYPES.values()}
    points = [
        Point(c.name, *work)
        for c in peers[torch.float32]
        for work in MEMORY
        if memory and STATUS.exists() and c.make and not c.absent and not c.compiled
    ]
    try:
        with tqdm(total=len(chosen) + len(points), smoothing=0, disable=None) as bar:
            bar.set_description("checking results")
            dtypes = {setting.case.dtype for setting in chosen}
            wrong = {dtype: faults(peers[dtype], dtype) for dtype in dtypes}
            for setting in chosen:
                bar.set_description(setting.name)
                of = peers[setting.case.dtype]
                slow = {c.name: why for c in of if (why := too_slow(c, setting.case))}
                refused = {name: {"not_measured": why} for name, why in slow.items()}
                refused |= wrong[setting.case.dtype]
                results["cases"][setting.name] = measure(setting, of, refused, seconds)
                write(file, results)
                bar.update()
            for point, extra in zip(points, extra_bytes(points), strict=True):
                bar.set_description(f"memory of {point.optimizer}")
                found = {"elements": point.elements, "tensors": point.tensors, "extra_bytes": extra}
                results["memory"].setdefault(point.optimizer, []).append(found)
                bar.update()
        results["interrupted"] = False
    except KeyboardInterrupt:
        pass
    write(file, results)
    return results


def faults(contenders: Sequence[Contender], dtype: torch.dtype) -> dict[str, Row]:
    """Rows of the RAdams that are wrong, or do not work here."""
    return {
        c.name: row
        for c in contenders
        if c.radam and not c.absent and (row := fault(c, DEVICE, dtype))
    }


def too_slow(contender: Contender, case: Case) -> str | None:
    """Why timing it would take minutes, or tell nothing new."""
    if contender.absent or not contender.make:
        return None
    if case.elements > SLOW and (contender.flat or contender.name not in QUICK):
        return f"time: measured up to {SLOW >> 20}M elements only"
    if contender.compiled and len(case.shapes) > 1:
        return "time: compiled for one tensor only"
    return None


if __name__ == "__main__":
    sys.exit(main())
