"""Times a step on a GPU against torch's optimizers and a copy: `python -m bench.gpu_time`.

For each case and optimizer: the device's time of a whole step() by CUDA events, gaps between its
launches included, and the host's time of the call. Correctness first: every RAdam is held to the
formula in float64, and one that is wrong has no speed. gpu.json is rewritten after each case.
"""

import argparse
import gc
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch

from . import aims, machine
from .cases import DTYPES, Case, cases
from .clocks import Clock, make_clock
from .contenders import CUDA, TRITON, Contender, contenders
from .folders import results_folder
from .formula import check
from .turns import OUT_OF_TIME, DeviceLostError, Row, measure

SCHEMA = 1
FILE = "gpu.json"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--out", type=Path, help="folder (bench/results/<device>)")
    parser.add_argument("--dry-run", action="store_true", help="the same on the CPU, tiny")
    parser.add_argument("--only", default="", metavar="REGEX", help="of the cases' names")
    parser.add_argument("--resume", action="store_true", help="keep what FILE has of these sources")
    parser.add_argument("--minutes", type=float, default=7, help="in all (%(default)s)")
    parser.add_argument("--seconds", type=float, default=8, help="for a case (%(default)s)")
    parser.add_argument("--once", metavar="CASE", help="one step of our kernels, for a profiler")
    args = parser.parse_args(arguments)
    deadline = time.monotonic() + 60 * args.minutes
    device = torch.device("cpu") if args.dry_run else args.device
    if device.type == "cuda" and not torch.cuda.is_available():
        print("torch finds no GPU; --dry-run tries the code without one", file=sys.stderr)
        return 2
    if device.type != "cuda" and not args.dry_run:
        print(f"--device: expected a CUDA device, got {device}", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    chosen = [case for case in cases(args.dry_run) if re.search(args.only, case.name)]
    if args.once:
        named = [case for case in chosen if case.name == args.once]
        if not named:
            parser.error(f"--once: expected one of {[c.name for c in chosen]}, got {args.once!r}")
        return once(named[0], device)
    name = "dry-run" if args.dry_run else torch.cuda.get_device_name(device)
    out = args.out or results_folder(name)
    results = run(chosen, device, out / FILE, deadline, args.seconds, args.resume)
    print("\n".join(["", *aims.report(results, CUDA)]))
    faults = _faults(results)
    if faults:
        print(f"WRONG: {'; '.join(faults)}")
    return 1 if faults else 0


def run(
    chosen: list[Case],
    device: torch.device,
    file: Path,
    deadline: float,
    seconds: float,
    resume: bool = False,
) -> dict[str, Any]:
    """Measures the cases in turn, and writes the file after each; returns what is in it."""
    clock = make_clock(device)
    results = {
        "schema": SCHEMA,
        "dry_run": device.type != "cuda",
        **machine.facts(device),
        "clock": clock.words,
        "empty_step_us": 1e6 * min(clock.sample(lambda: None, 1e-3).device for _ in range(20)),
        "cases": _kept(file, device) if resume else {},
    }
    refused = {name: _check(dtype, clock, device, deadline) for name, dtype in DTYPES.items()}
    gc.collect()
    gc.freeze()  # what is there now stays: collecting the optimizers of each turn is quick then
    lost = ""
    for case in chosen:
        if case.name in results["cases"]:
            continue
        peers = contenders(case.dtype, device.type)
        rows = {c.name: {"not_measured": lost} for c in peers}
        if not lost:
            no = refused[str(case.dtype).removeprefix("torch.")]
            try:
                rows = measure(
                    case, peers, clock, device, deadline=deadline, seconds=seconds, refused=no
                )
            except DeviceLostError as error:
                lost = str(error)
                rows = {c.name: {"not_measured": lost} for c in peers}
        found = {"elements": case.elements, "tensors": len(case.shapes), "rows": rows}
        results["cases"][case.name] = found
        write(file, results)
        print("\n".join(_lines(case.name, rows)), flush=True)
    gc.unfreeze()
    return results


def once(case: Case, device: torch.device) -> int:
    """One step of each of our kernels between cudaProfilerStart and Stop."""
    params = case.make(device)
    for contender in contenders(case.dtype, device.type):
        if contender.name not in (CUDA, TRITON):
            continue
        started = contender.start(params)
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
        started.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
        print(f"{case.name}: one step of {contender.name}, {contender.bytes * case.elements} bytes")
    return 0


def _check(
    dtype: torch.dtype, clock: Clock, device: torch.device, deadline: float
) -> dict[str, Row]:
    """Rows of the RAdams that are wrong, or do not work here."""
    rows: dict[str, Row] = {}
    for contender in contenders(dtype, device.type):
        if (
            contender.radam
            and time.monotonic() < deadline
            and (row := fault(contender, device, dtype))
        ):
            rows[contender.name] = row
            print(f"{contender.name}, {dtype}: {row}", flush=True)
    clock.synchronize()
    return rows


def fault(contender: Contender, device: torch.device, dtype: torch.dtype) -> Row | None:
    """A row that says what is wrong with a contender, if anything is."""
    try:
        found = check(contender.start, device, dtype, contender.debiased, contender.slack)
    except Exception as error:
        return {"not_measured": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
    return {"wrong": found} if found else None


def _kept(file: Path, device: torch.device) -> dict[str, Any]:
    """The cases that the file has of this device and these sources, but for what lacked time."""
    now = machine.facts(device)
    try:
        old = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    if any(old.get(key) != now[key] for key in ("device", "versions", "sources")):
        return {}
    return {
        name: case
        for name, case in old["cases"].items()
        if all(row.get("not_measured") != OUT_OF_TIME for row in case["rows"].values())
    }


def write(file: Path, results: dict[str, Any]) -> None:
    """All of it or nothing: a run that is cut off leaves a whole file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_suffix(".new")
    new.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(new, file)


def _faults(results: dict[str, Any]) -> list[str]:
    return [
        f"{optimizer}, {name}: {row['wrong']}"
        for name, case in results["cases"].items()
        for optimizer, row in case["rows"].items()
        if "wrong" in row
    ]


def _lines(title: str, rows: dict[str, Row]) -> list[str]:
    lines = [f"\n{title}"]
    for name, row in rows.items():
        if "device_ms" not in row:
            lines.append(f"  {name:36}{row.get('wrong') or row.get('not_measured')}")
            continue
        ms = row["device_ms"]
        share = f"{row['copy_share']:6.1%}" if row["copy_share"] else ""
        lines.append(
            f"  {name:36}{ms['median']:10.4f} ms ({ms['p20']:.4f}-{ms['p80']:.4f}, {ms['count']:3})"
            f"{row['gb_s']:9.1f} GB/s{share:>7} of the copy{row['host_us']['median']:9.1f} us host"
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())
