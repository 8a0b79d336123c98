"""Times variants of the GPU kernels against today's: `python -m bench.gpu_tune`.

All of bench/variants.py are built, checked and measured in turns, as bench.gpu_time does with the
optimizers. A variant must give the formula's result and the CPU kernel's bits, or has no speed.
tune.json is rewritten after each case; the table has the best at the float32 case of 2^28 first.
"""

import argparse
import gc
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

import radam_kernels
from radam_kernels.backends import cuda, triton_

from . import machine, machine_code
from .cases import Case, cases, list_case, model_case, size_case
from .clocks import make_clock
from .contenders import Contender, copy_name
from .folders import results_folder
from .gpu_time import fault, write
from .turns import OUT_OF_TIME, DeviceLostError, Row, measure
from .variants import TODAY, TRITON_TODAY, VARIANTS, Variant, build, load_cuda, load_triton

SCHEMA = 1
FILE = "tune.json"
MAIN = size_case(28, "float32")
BITS_STEPS = 7  # the last is rectified
DRY_ARCH = "90-real"
DRY_VARIANTS = (TODAY, "unroll 2", "triton: 1024 by 4 warps")


class Tuned(NamedTuple):
    """A case, and the moments' dtype where it is not float32."""

    case: Case
    half: bool = False

    @property
    def name(self) -> str:
        return self.case.name + ", bf16 moments" * self.half

    @property
    def options(self) -> dict[str, Any]:
        return {"state_dtype": self.case.dtype} if self.half else {}

    @property
    def bytes(self) -> int:
        return 3 * self.case.dtype.itemsize + 4 * (self.case.dtype.itemsize if self.half else 4)


class Candidate(NamedTuple):
    """A variant, ready to run or with the reason why it is not."""

    variant: Variant
    module: ModuleType | None = None
    not_measured: str = ""
    machine_code: dict[str, Any] = {}  # noqa: RUF012 # never changed

    def make(self, tuned: Tuned, device: torch.device) -> Callable[..., torch.optim.Optimizer]:
        """Makes optimizers that step by this variant, until another variant's is made."""
        backend = "triton" if self.variant.triton else "cuda" if device.type == "cuda" else "cpu"

        def make(params, lr):
            if self.variant.triton:
                triton_.CHUNK, triton_.launch_ = self.module.CHUNK, self.module.launch_
            elif self.module:
                cuda._cuda = self.module
            return radam_kernels.RAdam(params, lr, backend=backend, **tuned.options)

        return make


def tuned_cases(dry_run: bool) -> list[Tuned]:
    """The most telling first, so that a lack of time costs the least."""
    every = {case.name: case._replace(host=False) for case in cases(dry_run)}
    half = size_case(28, "bfloat16")
    rest = size_case(26, "float32"), model_case("GPT-2 124M", "float32"), list_case(1000, "float32")
    return [
        Tuned(every[MAIN]), Tuned(every[half]), Tuned(every[half], True),
        *(Tuned(every[name]) for name in rest),
    ]  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="folder (bench/results/<device>)")
    parser.add_argument("--dry-run", action="store_true", help="a few on the CPU, tiny")
    parser.add_argument("--only", default="", metavar="REGEX", help="of the variants' names")
    parser.add_argument("--seconds", type=float, default=60, help="for a case, at most (60)")
    parser.add_argument("--minutes", type=float, default=7, help="in all (%(default)s)")
    args = parser.parse_args(arguments)
    deadline = time.monotonic() + 60 * args.minutes
    if not args.dry_run and not torch.cuda.is_available():
        print("torch finds no GPU; --dry-run tries the code without one", file=sys.stderr)
        return 2
    device = torch.device("cpu" if args.dry_run else "cuda")
    chosen = [v for v in VARIANTS if re.search(args.only, v.name)]
    with tempfile.TemporaryDirectory() as folder:
        if args.dry_run:
            chosen = [v for v in chosen if v.name in DRY_VARIANTS]
            failed = try_build(Path(folder), deadline)
            built = {}
        else:
            major, minor = torch.cuda.get_device_capability()
            # The smaller part of the time: what is not built by then is not measured.
            until = deadline - 0.5 * 60 * args.minutes
            built, failed = build_all(chosen, Path(folder), f"{major}{minor}-real", until), False
        candidates = [prepare(v, built.get(v.name, Candidate(v)), Path(folder)) for v in chosen]
        name = "dry-run" if args.dry_run else torch.cuda.get_device_name()
        file = (args.out or results_folder(name)) / FILE
        results = run(tuned_cases(args.dry_run), candidates, device, file, deadline, args.seconds)
    print("\n".join(["", *table(results)]))
    return (
        1 if failed or any("wrong" in row for row in rows_of(results, TODAY, TRITON_TODAY)) else 0
    )


def try_build(folder: Path, deadline: float) -> bool:
    """Builds a variant that could spill, and says what came of it; whether it failed."""
    if not shutil.which("nvcc"):
        print("no variant is built: nvcc is not on the PATH")
        return False
    variant = next(v for v in VARIANTS if v.name == DRY_VARIANTS[1])
    found = build_all([variant], folder, DRY_ARCH, deadline)[variant.name]
    spills = any(code["stack"] for code in found.machine_code.values())
    print(
        f"{variant.name}: {found.not_measured or found.machine_code or 'no cuobjdump'}", flush=True
    )
    return bool(found.not_measured) or spills


def build_all(
    variants: Iterable[Variant], folder: Path, arch: str, until: float
) -> dict[str, Candidate]:
    """The CUDA variants, several at a time, each on half of the cores that are left to it."""

    def one(i: int, variant: Variant) -> Candidate:
        try:
            if (seconds := until - time.monotonic()) <= 0:
                return Candidate(variant, None, OUT_OF_TIME)
            file = build(variant, folder / str(i), arch, seconds)
            code = read(file, f"sm_{arch.partition('-')[0]}") if machine_code.cuobjdump() else {}
            return Candidate(variant, load_cuda(variant, file), "", code)
        except subprocess.TimeoutExpired:
            return Candidate(variant, None, OUT_OF_TIME)
        except Exception as error:  # whatever it is, the other variants go on
            return Candidate(variant, None, f"{type(error).__name__}: {error}"[:400])

    begin, chosen = time.monotonic(), [v for v in variants if not v.triton]
    with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)) // 2)) as pool:
        made = list(pool.map(one, range(len(chosen)), chosen))
    print(f"{len(made)} variants built in {time.monotonic() - begin:.0f} s", flush=True)
    return {found.variant.name: found for found in made}


def prepare(variant: Variant, found: Candidate, folder: Path) -> Candidate:
    """The candidate with its module, for Triton's too."""
    if not variant.triton:
        return found
    try:
        return Candidate(variant, load_triton(variant, folder / "triton"))
    except Exception as error:
        return Candidate(variant, None, f"{type(error).__name__}: {error}"[:400])


def read(file: Path, arch: str) -> dict[str, Any]:
    """Of each kernel in a module, by its dtypes: what decides how much of it is resident."""
    return {
        k.dtypes: {
            "registers": k.registers,
            "stack": k.stack,
            **({"in_flight": k.in_flight} if arch in machine_code.GPUS else {}),
        }
        for k in machine_code.read_sass(file, arch, "cuda")
    }


def run(
    chosen: list[Tuned],
    candidates: list[Candidate],
    device: torch.device,
    file: Path,
    deadline: float,
    seconds: float,
) -> dict[str, Any]:
    """Measures the cases in turn, and writes the file after each; returns what is in it."""
    torch.manual_seed(0)
    clock = make_clock(device)
    results: dict[str, Any] = {
        "schema": SCHEMA,
        "dry_run": device.type != "cuda",
        **machine.facts(device),
        "clock": clock.words,
        "variants": {
            c.variant.name: {"changes": c.variant.changes, "machine_code": c.machine_code}
            for c in candidates
        },
        "cases": {},
    }
    patched = (cuda, "_cuda"), (triton_, "CHUNK"), (triton_, "launch_")
    before = [getattr(module, name, None) for module, name in patched]
    lost, refused = "", {}
    gc.collect()
    gc.freeze()  # what is there now stays: collecting the optimizers of each turn is quick then
    try:
        for i, tuned in enumerate(chosen):
            peers = [Contender(copy_name(tuned.bytes), tuned.bytes)]
            peers += [
                Contender(c.variant.name, tuned.bytes, c.make(tuned, device), True)
                for c in candidates
            ]
            rows = {p.name: {"not_measured": lost} for p in peers}
            if not lost:
                try:
                    key = tuned.case.dtype, tuned.half  # cases share kernels
                    if key not in refused:
                        refused[key] = refusals(tuned, candidates, peers, device, deadline)
                    rows = measure(
                        tuned.case, peers, clock, device, deadline=deadline, refused=refused[key],
                        seconds=min(seconds, (deadline - time.monotonic()) / (len(chosen) - i)),
                    )  # fmt: skip
                except DeviceLostError as error:
                    lost = str(error)
                    rows = {p.name: {"not_measured": lost} for p in peers}
            results["cases"][tuned.name] = {"elements": tuned.case.elements, "rows": rows}
            write(file, results)
            print(
                f"{tuned.name}: {sum('device_ms' in row for row in rows.values())} measured",
                flush=True,
            )
    finally:
        for (module, name), value in zip(patched, before, strict=True):
            setattr(module, name, value)
        gc.unfreeze()
    return results


def refusals(
    tuned: Tuned,
    candidates: Iterable[Candidate],
    peers: Iterable[Contender],
    device: torch.device,
    deadline: float,
) -> dict[str, Row]:
    """Rows of the variants that are wrong, or do not work here."""
    rows: dict[str, Row] = {}
    by_name = {c.variant.name: c for c in candidates}
    for peer in peers:
        if peer.name not in by_name or time.monotonic() > deadline:
            continue
        if reason := by_name[peer.name].not_measured:
            rows[peer.name] = {"not_measured": reason}
            continue
        row = fault(peer, device, tuned.case.dtype)
        if not row and (other := other_bits(peer.make, tuned, device)):
            row = {"wrong": other}
        try:
            torch.cuda.synchronize() if device.type == "cuda" else None
        except Exception as error:
            raise DeviceLostError(f"{peer.name}: the device failed: {error}"[:300]) from error
        if row:
            rows[peer.name] = row
            print(f"{peer.name}, {tuned.name}: {row}", flush=True)
    return rows


def other_bits(make: Callable[..., Any], tuned: Tuned, device: torch.device) -> str | None:
    """Where a variant's steps leave other bits than the CPU kernel's, on all of every tensor."""
    generator = torch.Generator().manual_seed(0)
    ours, theirs = [], []
    # Whole chunks, parts of them and single elements; the last starts off 16 bytes.
    large = 2**18 + 2**13 if device.type == "cuda" else 2**11
    for size, offset in ((large, 0), (large + 5, 0), (257, 0), (1, 0), (large + 5, 1)):
        values = [
            torch.randn(size + offset, generator=generator).to(tuned.case.dtype) for _ in "pg"
        ]
        for params, where in ((ours, device), (theirs, torch.device("cpu"))):
            param, grad = (value.to(where, copy=True)[offset:] for value in values)
            params.append(param.requires_grad_())
            params[-1].grad = grad
    # The order matters: what makes the variant's optimizer puts the variant in force.
    plain = radam_kernels.RAdam(theirs, 0.1, backend="cpu", **tuned.options)
    varied = make(ours, 0.1)
    for _ in range(BITS_STEPS):
        plain.step()
        varied.step()
    for i, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        for name in ("param", "exp_avg", "exp_avg_sq"):
            a, b = (
                param if name == "param" else optimizer.state[param][name]
                for param, optimizer in ((our, varied), (their, plain))
            )
            if differ := int((a.detach().cpu() != b.detach()).sum()):
                return f"{name} of tensor {i} has other bits in {differ} of {b.numel()} elements"
    return None


def rows_of(results: dict[str, Any], *names: str) -> list[Row]:
    """The rows of these variants in every case."""
    return [
        row
        for case in results["cases"].values()
        for name, row in case["rows"].items()
        if name in names
    ]


def table(results: dict[str, Any]) -> list[str]:
    """A line for each variant, the best first: registers by dtypes, times, shares of the copy."""
    all_rows = {name: case["rows"] for name, case in results["cases"].items()}

    def share(name: str) -> float:
        return all_rows[MAIN].get(name, {}).get("copy_share") or 0

    lines = [
        "  ".join(
            ["variant".ljust(34), "registers".ljust(9), *(case.ljust(17) for case in all_rows)]
        )
    ]
    for name in sorted(results["variants"], key=share, reverse=True):
        code = results["variants"][name]["machine_code"].values()
        cells = ["/".join(str(k["registers"]) + "*" * bool(k["stack"]) for k in code).ljust(9)]
        for case, rows in all_rows.items():
            row = rows[name]
            if ms := row.get("device_ms"):
                text = f"{ms['median']:.4f} ms" + (
                    f" {row['copy_share']:.1%}" * bool(row["copy_share"])
                )
            else:
                text = "WRONG" if "wrong" in row else "none"
            cells.append(text.ljust(max(17, len(case))))
        mark = "> " * (name in (TODAY, TRITON_TODAY))
        lines.append("  ".join([(mark + name).ljust(34), *cells]).rstrip())
    reasons = {
        f"  {name}: {reason}"
        for rows in all_rows.values()
        for name, row in rows.items()
        if (reason := row.get("wrong") or row.get("not_measured"))
    }
    note = "> as the sources are; %: of a copy of as many bytes; *: these registers spill."
    if results["dry_run"]:
        note += " A dry run: the times say nothing."
    return [*lines, note, *sorted(reasons)]


if __name__ == "__main__":
    sys.exit(main())
