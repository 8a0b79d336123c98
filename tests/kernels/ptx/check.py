"""Executes the compilers' PTX of every kernel on the CPU and compares the bits, without a GPU.

    python -m tests.kernels.ptx.check                           # everything, in five minutes
    python -m tests.kernels.ptx.check --only float32-bfloat16 --cases 20 --seed 1
    python -m tests.kernels.ptx.check --only cuda --arch 75

nvcc compiles csrc/cuda/*.cu with the flags of CMakeLists.txt, and Triton compiles its
kernels as their launches ask for them. The step kernels must give the bits of the reference backend
and of the CPU kernel, and must do nothing that machine.py forbids. Planted faults must be seen.

What this can't show: ptxas, the GPU's division, square root and memory ordering, and the host's
code around the launches.
"""

import argparse
import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path

import torch

from radam_kernels.modules import cpu
from tests.helpers import DTYPE_SETS, LOW_MEMORY_SETS, dtypes_id
from tests.kernels.norms import NORMS

from .arithmetic import Fault
from .compilers import Codes, Compiled, nvcc, triton_norm, triton_step, triton_upload
from .exact import check_arithmetic
from .faults import FAULTS, Planted
from .norm_kernels import NormKernels
from .program import Program, loose
from .small_kernels import check_advance, check_cuda_upload, check_triton_upload
from .step_kernels import StepKernel


@dataclass
class Settings:
    arch: str = "90"  # the compute capability to compile for
    cases: int = 2  # how many times one, two and forty random segments
    seed: int = 0
    save: Path | None = None  # a folder for the PTX


@dataclass
class Report:
    """What one check found."""

    wrong: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    launches: int = 0
    elements: int = 0
    name: str = ""
    seconds: float = 0.0


Check = Callable[[Settings], Report]


def checks() -> dict[str, Check]:
    """All of them, by name."""
    small = {
        "cuda advance": (lambda s: nvcc(s.arch)["advance"], check_advance),
        "cuda upload": (lambda s: nvcc(s.arch)["upload"], check_cuda_upload),
        "triton upload": (lambda s: triton_upload(s.arch), check_triton_upload),
    }
    found: dict[str, Check] = {"arithmetic": lambda _: Report(*check_arithmetic())}
    for name, (compiled, check) in small.items():
        found[name] = lambda s, c=compiled, f=check: check_small(saved(c(s), s), f)
    for name, (backend, codes, factor) in steps().items():
        found[name] = lambda s, b=backend, c=codes, f=factor: check_step(b, c, f, s)
    for name, (backend, dtype, norm) in norm_sums().items():
        found[name] = lambda s, b=backend, d=dtype, n=norm: check_norm(b, d, n, s)
    for fault in FAULTS:
        found[f"fault: {fault.name}"] = lambda s, f=fault: check_fault(f, s)
    return found


def steps() -> dict[str, tuple[str, Codes, bool]]:
    """Backend, dtypes, and whether there may be a factor; a CUDA kernel is for both answers."""
    every = (*DTYPE_SETS, *LOW_MEMORY_SETS)
    found = {f"cuda {dtypes_id(c)}": ("cuda", c, True) for c in every}
    found |= {f"triton {dtypes_id(c)}": ("triton", c, False) for c in every}
    few = ((0, 0, 0), (1, 1, 0), (3, 3, 3), (5, 1, 7))
    return found | {f"triton factor {dtypes_id(c)}": ("triton", c, True) for c in few}


def norm_sums() -> dict[str, tuple[str, int, float]]:
    """Backend, dtype and norm."""
    return {
        f"{backend} norm {norm:g} {name}": (backend, code, norm)
        for backend in ("cuda", "triton")
        for code, name in enumerate(cpu.dtypes)
        for norm in NORMS
    }


def compile_step(backend: str, codes: Codes, factor: bool, arch: str) -> Compiled:
    if backend == "triton":
        return triton_step(codes, arch, factor)
    source = "low_memory_cuda" if codes in LOW_MEMORY_SETS else "step_cuda"
    return nvcc(arch, source)[codes]


def compile_norm(
    backend: str, dtype: int, norm_type: float, arch: str
) -> tuple[Compiled, Compiled]:
    if backend == "triton":
        return triton_norm(dtype, norm_type, arch)
    kernels = nvcc(arch, "norm_cuda")
    return kernels[dtype, norm_type], kernels[norm_type == math.inf]


def saved(compiled: Compiled, settings: Settings) -> Compiled:
    if settings.save:
        settings.save.mkdir(parents=True, exist_ok=True)
        (settings.save / compiled.file).write_text(compiled.text)
    return compiled


def check_small(compiled: Compiled, check: Callable) -> Report:
    program = compiled.program()
    wrong, notes = check(program)
    return Report(wrong, notes + coverage(program))


def check_step(backend: str, codes: Codes, factor: bool, settings: Settings) -> Report:
    compiled = saved(compile_step(backend, codes, factor, settings.arch), settings)
    kernel = StepKernel(compiled, codes, backend, factor)
    # These kernels are long, and the first cases hold every size, alignment and action.
    cases = -(-settings.cases // 2) if kernel.low_memory else settings.cases
    wrong = what_is_wrong(lambda: list(kernel.wrong(settings.seed, cases)))
    wrong += wrong_in_text(kernel.program, not wrong)
    return Report(wrong, coverage(kernel.program), kernel.launches, kernel.elements)


def check_norm(backend: str, dtype: int, norm_type: float, settings: Settings) -> Report:
    compiled = compile_norm(backend, dtype, norm_type, settings.arch)
    kernels = NormKernels([saved(one, settings) for one in compiled], dtype, norm_type, backend)
    wrong, notes = what_is_wrong(kernels.check), []
    for program in (kernels.partial, kernels.total):
        wrong += wrong_in_text(program, not wrong)
        notes += coverage(program)
    return Report(wrong, notes, kernels.launches, kernels.elements)


def wrong_in_text(program: Program, complete: bool) -> list[str]:
    """Operations that do not round once; and, after a `complete` check, too few executed ones."""
    code = program.code
    wrong = [f"line {one.line}: {one.text}: not one exact rounding" for one in loose(program)]
    executed = sum(one.hits > 0 for one in code)
    if complete and executed < 0.95 * len(code):
        wrong.append(f"only {executed} of {len(code)} instructions were executed")
    return wrong


def what_is_wrong(check: Callable[[], list[str]]) -> list[str]:
    try:
        return check()
    except Fault as fault:
        return [f"Fault: {fault}"]


def coverage(program: Program) -> list[str]:
    never = [one for one in program.code if not one.hits]
    lines = [f"{len(program.code) - len(never)} of {len(program.code)} instructions executed"]
    for one in never[:5]:
        why = "its predicate never held" if one.reached else "never reached"
        lines.append(f"{why}: line {one.line}: {one.text}")
    return lines


def check_fault(fault: Planted, settings: Settings) -> Report:
    """Plants a fault, which must show when the kernel is executed."""
    if fault.norm_type is None:
        compiled = compile_step(fault.backend, fault.codes, True, settings.arch)
        kernel = StepKernel(planted(fault, compiled), fault.codes, fault.backend, True)
        first = kernel.wrong(settings.seed, settings.cases)
        wrong = what_is_wrong(lambda: list(islice(first, 1)))
    else:
        [dtype], norm_type = fault.codes, fault.norm_type
        partial, total = compile_norm(fault.backend, dtype, norm_type, settings.arch)
        kernel = NormKernels((planted(fault, partial), total), dtype, norm_type, fault.backend)
        wrong = what_is_wrong(kernel.check)
    if wrong:
        return Report([], [f"seen: {wrong[0][:300]}"], kernel.launches, kernel.elements)
    return Report(["not seen"], [], kernel.launches, kernel.elements)


def planted(fault: Planted, compiled: Compiled) -> Compiled:
    begin = compiled.text.index(f".entry {compiled.name}(")
    end = compiled.text.index("\n}", begin)
    edited = fault.edit(compiled.text[begin:end])
    return compiled._replace(text=compiled.text[:begin] + edited + compiled.text[end:])


def run(name: str, settings: Settings) -> Report:
    check, begun = checks()[name], time.perf_counter()
    try:
        report = check(settings)
    except Exception:
        report = Report([traceback.format_exc()])
    return replace(report, name=name, seconds=time.perf_counter() - begun)


def serve(settings: Settings) -> None:
    """Answers each name on stdin with a report in JSON, for test_ptx.py."""
    for line in sys.stdin:
        print(json.dumps(asdict(run(line.strip(), settings))), flush=True)


def show(reports: Iterator[Report]) -> bool:
    """Prints reports as they come, and returns whether all is well."""
    begun, launches, elements, wrong, count = time.perf_counter(), 0, 0, 0, 0
    for report in reports:
        verdict = "WRONG" if report.wrong else "ok"
        work = f"{report.launches} launches, {report.elements} elements, " * bool(report.launches)
        print(f"{report.name}: {verdict}; {work}{report.seconds:.1f} s", flush=True)
        for line in (*(f"WRONG {line}" for line in report.wrong[:5]), *report.notes):
            print("  " + line, flush=True)
        count, wrong = count + 1, wrong + bool(report.wrong)
        launches, elements = launches + report.launches, elements + report.elements
    print(
        f"{count} checks, {wrong} of them failed: {launches} launches, {elements} elements, "
        f"{time.perf_counter() - begun:.0f} s"
    )
    return count > 0 and wrong == 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    defaults = Settings()
    parser.add_argument("--only", default="", help="the checks whose name contains this")
    parser.add_argument("--arch", default=defaults.arch, help="compute capability to compile for")
    parser.add_argument("--cases", type=int, default=defaults.cases, help="random launches by 3")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument(
        "--save", type=Path, help="a folder for the PTX, whose lines the report names"
    )
    parser.add_argument("--serve", action="store_true", help="read names from stdin, write JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    settings = Settings(args.arch, args.cases, args.seed, args.save)
    if args.serve:
        serve(settings)
        return 0
    return not show(run(name, settings) for name in checks() if args.only in name)


if __name__ == "__main__":
    sys.exit(main())
