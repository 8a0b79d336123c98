"""Times variants of the GPU kernels against today's: `python -m bench gpu tune`.

A CUDA variant is built by CMakeLists.txt with other -D macros (csrc/cuda/step_cuda.cu), a Triton
variant has another chunk and number of warps. Each must give the formula's result and the CPU
kernel's bits, or has no time. They take turns, as optimizers do.
"""

import argparse
import importlib.util
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import torch

from radam_kernels import RAdam
from radam_kernels.backends import cuda, triton_kernel

from .. import cases, correctness, results, timing
from ..cases import Case
from ..correctness import MEASURED, NOT_MEASURED, WRONG
from ..optimizers import Optimizer, narrow, wide
from . import machine_code

FILE = "tune.json"
TODAY, TRITON_TODAY = "today", "triton, today"
HALF = "bf16 moments"
BITS_STEPS = 7  # the last is rectified
BUILD_PART = 0.5  # of the time: what is not built by then is not measured


@dataclass
class Variant:
    """A way to compile a kernel, and what came of it.

    Attributes:
        macros: of the CUDA kernel, by name.
        chunk, warps: of the Triton kernel, if it is one.
        module: the built _cuda.
        reason: why it can't be measured.
        registers: of the CUDA kernels, by dtypes; a * marks those that spill.
    """

    name: str
    macros: dict[str, int | None] = field(default_factory=dict)
    chunk: int = 0
    warps: int = 0
    module: ModuleType | None = None
    reason: str = ""
    registers: dict[str, str] = field(default_factory=dict)

    def optimizer(self, half: bool) -> Optimizer:
        """A row of the benchmark whose steps are by this variant."""

        def make(params: Sequence[torch.Tensor], lr: float) -> RAdam:
            backend = "triton" if self.chunk else params[0].device.type
            dtype = params[0].dtype if half else None
            optimizer = _Tuned(params, lr, backend=backend, state_dtype=dtype)
            optimizer.variant = self
            return optimizer

        return Optimizer(self.name, make, narrow if half else wide, level=0, radam=True)


class _Tuned(RAdam):
    """An optimizer that puts its variant in force before each step."""

    variant: Variant

    def step(self, closure: None = None) -> None:
        variant = self.variant
        if variant.chunk:
            triton_kernel.CHUNK, triton_kernel.WARPS = variant.chunk, variant.warps
        elif variant.module:
            cuda._cuda = variant.module
        return super().step(closure)


def variants() -> list[Variant]:
    """All that are compared; the first of each kernel is the kernel as its source is."""
    shapes = [(256, 1), (256, 2), (256, 8), (128, 4), (512, 2), (512, 4)]
    named = [Variant(f"{t} threads x {v}", {"RADAM_THREADS": t, "RADAM_VECTORS": v})
             for t, v in shapes]  # fmt: skip
    chunks = [(1024, 4), (2048, 4), (4096, 4), (4096, 8), (4096, 16)]
    return [
        Variant(TODAY),
        Variant("today, again"),  # what differs by no more than these two does not differ
        Variant("streaming hints", {"RADAM_STREAMING": None}),
        Variant("vectors of the narrowest", {"RADAM_NARROWEST": None}),
        *named,
        Variant(TRITON_TODAY, chunk=triton_kernel.CHUNK, warps=triton_kernel.WARPS),
        *(Variant(f"triton, {c} by {w} warps", chunk=c, warps=w) for c, w in chunks),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench gpu tune", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="folder (bench/results/<device>)")
    parser.add_argument("--dry-run", action="store_true", help="two variants on the CPU, tiny")
    parser.add_argument("--only", default="", metavar="REGEX", help="of the variants' names")
    parser.add_argument("--minutes", type=float, help="in all (5; dry: 0.2)")
    args = parser.parse_args(arguments)
    minutes = args.minutes or (0.2 if args.dry_run else 5)
    deadline = time.monotonic() + 60 * minutes
    chosen = [v for v in variants() if re.search(args.only, v.name)]
    if args.dry_run:
        name, device = "dry-run", torch.device("cpu")
        chosen = [v for v in chosen if v.name in (TODAY, TRITON_TODAY)]
    elif not torch.cuda.is_available():
        print("torch finds no GPU; --dry-run tries the code without one", file=sys.stderr)
        return 2
    else:
        name, device = torch.cuda.get_device_name(), torch.device("cuda")
        build_all(chosen, deadline - 60 * minutes * (1 - BUILD_PART))
    file = (args.out or results.results_folder(name)) / FILE
    rows = measure(chosen, device, file, deadline)
    print(table(rows, chosen))
    wrong = [r for r in rows if r["optimizer"] == TODAY and r["status"] == WRONG]
    return 1 if wrong else 0


def build_all(chosen: Iterable[Variant], until: float) -> None:
    """Builds the CUDA variants for this GPU, several at a time, by `until` of time.monotonic()."""
    arch = "{}{}".format(*torch.cuda.get_device_capability())
    with (
        tempfile.TemporaryDirectory() as folder,
        ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)) // 2)) as pool,
    ):
        unbuilt = [variant for variant in chosen if not variant.chunk]
        reasons = pool.map(lambda variant: build(variant, Path(folder), arch, until), unbuilt)
        for variant, reason in zip(unbuilt, reasons, strict=True):
            variant.reason = reason


def build(variant: Variant, folder: Path, arch: str, until: float) -> str:
    """Builds and loads a variant's module; returns why that failed, or nothing."""
    key = re.sub(r"\W+", "_", variant.name)
    macros = " ".join(f"-D{k}" + f"={v}" * (v is not None) for k, v in variant.macros.items())
    made = folder / key
    options = (
        "CMAKE_BUILD_TYPE=Release",
        f"RADAM_CUDA_ARCHS={arch}-real",
        f"CMAKE_CUDA_FLAGS={macros}",
        f"Python_EXECUTABLE={sys.executable}",
    )
    configure = ["cmake", "-S", results.ROOT, "-B", made, "-G", "Ninja"]
    commands = [
        [*configure, *(f"-D{option}" for option in options)],
        ["cmake", "--build", made, "--target", "_cuda"],
    ]
    for command in commands:
        try:
            subprocess.run(
                command,
                check=True,
                capture_output=True,
                text=True,
                timeout=until - time.monotonic(),
            )
        except subprocess.TimeoutExpired:
            return timing.OUT_OF_TIME
        except subprocess.CalledProcessError as error:
            return f"it does not build: {error.stdout[-300:]}{error.stderr[-300:]}"
    try:
        file = shutil.copy(next(made.glob("_cuda.*")), folder / f"{key}.so")
        variant.module = _load(f"radam_variants.{key}._cuda", file)
        if machine_code.cuobjdump():
            variant.registers = {
                k.dtypes: f"{k.registers}{'*' * bool(k.stack)}"
                for k in machine_code.read_sass(Path(file), f"sm_{arch}", "cuda")
            }
    except Exception as error:
        return correctness.brief(error)
    return ""


def _load(name: str, file: str) -> ModuleType:
    """A module under a name of its own, by which pybind11 tells modules apart."""
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tuned_cases(tiny: bool) -> list[tuple[Case, bool]]:
    """Cases, and whether their moments have 16 bits; the most telling first."""
    by_name = {case.name: case for case in cases.all_cases()}
    half = by_name[cases.size(28, "bfloat16")]
    chosen = [
        (by_name[cases.size(28)], False),
        (half, False),
        (replace(half, name=f"{half.name}, {HALF}"), True),
        (by_name[cases.model("GPT-2 124M")], False),
        (by_name[cases.size(20)], False),
    ]
    return [(case.tiny() if tiny else case, half) for case, half in chosen]


def measure(
    chosen: Sequence[Variant], device: torch.device, file: Path, deadline: float
) -> list[timing.Row]:
    """A row for each variant and case; the file is written after each case."""
    torch.manual_seed(0)
    rows: list[timing.Row] = []
    tuned = tuned_cases(device.type == "cpu")
    before = cuda._cuda, triton_kernel.CHUNK, triton_kernel.WARPS
    try:
        for i, (case, half) in enumerate(tuned):
            optimizers = [variant.optimizer(half) for variant in chosen]
            rows += timing.measure(
                case,
                optimizers,
                device,
                refused=refusals(chosen, optimizers, case.dtype, device, deadline),
                seconds=(deadline - time.monotonic()) / (len(tuned) - i),
                deadline=deadline,
                dry_run=device.type == "cpu",
            )
            registers = {variant.name: variant.registers for variant in chosen}
            results.write(file, {**results.facts(device), "registers": registers, "rows": rows})
            print(f"{case.name}: measured", flush=True)
    finally:
        cuda._cuda, triton_kernel.CHUNK, triton_kernel.WARPS = before
    return rows


def refusals(
    chosen: Sequence[Variant],
    optimizers: Sequence[Optimizer],
    dtype: torch.dtype,
    device: torch.device,
    deadline: float = math.inf,
) -> dict[str, dict[str, str]]:
    """The status and reason of variants that are not there, are wrong, or give other bits."""
    absent = {v.name: {"status": NOT_MEASURED, "reason": v.reason} for v in chosen if v.reason}
    there = [optimizer for optimizer in optimizers if optimizer.name not in absent]
    found = correctness.refusals(there, device, dtype, deadline)
    for optimizer in there:
        if time.monotonic() > deadline:
            break  # timing.measure says so of all
        if optimizer.name not in found and (reason := other_bits(optimizer, dtype, device)):
            found[optimizer.name] = {"status": WRONG, "reason": reason}
    return absent | found


def other_bits(row: Optimizer, dtype: torch.dtype, device: torch.device) -> str:
    """Where a variant's steps leave other bits than the CPU kernel's, in all of every tensor."""
    generator = torch.Generator().manual_seed(0)
    # Whole chunks, parts of them and single elements; the last is not aligned.
    large = 2**18 + 2**13 if device.type == "cuda" else 2**11
    ours, theirs = [], []
    for numel, offset in ((large, 0), (large + 5, 0), (257, 0), (1, 0), (large + 5, 1)):
        values = [torch.randn(numel + offset, generator=generator).to(dtype) for _ in "pg"]
        for params, where in ((ours, device), (theirs, torch.device("cpu"))):
            param, grad = (value.to(where, copy=True)[offset:] for value in values)
            params.append(param.requires_grad_())
            params[-1].grad = grad
    tuned = row.make(ours, 0.1)
    plain = RAdam(theirs, 0.1, backend="cpu", state_dtype=tuned.defaults.get("state_dtype"))
    for _ in range(BITS_STEPS):
        tuned.step()
        plain.step()
    for i, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        pairs = {"param": (our.detach(), their.detach())}
        pairs |= {
            key: (tuned.state[our][key], plain.state[their][key])
            for key in ("exp_avg", "exp_avg_sq")
        }
        for name, (a, b) in pairs.items():
            if differ := int((a.cpu() != b).sum()):
                return f"{name} of tensor {i} has other bits in {differ} of {b.numel()} elements"
    return ""


def table(rows: list[timing.Row], chosen: Sequence[Variant]) -> str:
    """A line for each variant, the best first: registers, times, shares of a copy."""
    frame = pd.DataFrame(rows)
    frame = frame[frame["optimizer"].isin([variant.name for variant in chosen])]

    def cell(row: Any) -> str:
        if row.status != MEASURED:
            return row.reason
        return f"{row.ms:.4f} ms" + f", {row.limit_share:.1%}" * pd.notna(row.limit_share)

    frame["cell"] = [cell(row) for row in frame.itertuples()]
    order = frame.groupby("optimizer", sort=False)["limit_share"].mean().sort_values()[::-1].index
    wanted = frame.pivot(index="optimizer", columns="case", values="cell").loc[order]
    wanted = wanted[list(dict.fromkeys(frame["case"]))]
    shown = ("float32/float32/float32", "bfloat16/bfloat16/float32", "bfloat16/bfloat16/bfloat16")
    registers = {v.name: "/".join(v.registers.get(s, "-") for s in shown) for v in chosen}
    wanted.insert(0, "registers", [registers[name] for name in order])
    return wanted.to_markdown()


if __name__ == "__main__":
    sys.exit(main())
