"""What the compilers made of the kernels: `python -m bench.gpu.machine_code`.

Reads the installed `_cuda` module, and the Triton kernels compiled for GPUs that this machine does
not need. What is counted is the main path, which steps or adds up a whole chunk. It holds every
instruction that can run between the loads and the stores, so also the few of steps that are not
rectified, and leaves out what is called out of line: the slow path of IEEE division and square
root, for operands near the ends of the exponent range. gfx942 has those inline, where they are
counted. `in flight` is what the resident threads have loaded before they wait. Of the architectures
that the module was built for, those are shown whose GPU is among `GPUS`.
"""

import argparse
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from importlib.util import find_spec
from math import inf, nan
from pathlib import Path

import pandas as pd

from radam_kernels import modules

from .instructions import Instruction, main_path, parse_amdgcn, parse_sass
from .triton_compile import NORM_SETS, SETS, Codes, Compiled, compile_all

NAMES: tuple[str, ...] = (*modules.cpu.dtypes, *modules.cpu.formats)
# Bytes of an element, and of the remainder that a weight has beside them.
SIZES: tuple[int, ...] = tuple(
    modules.DTYPES[code].itemsize if code < len(modules.DTYPES) else 1 if name == "block8" else 2
    for code, name in enumerate(NAMES)
)
REMAINDERS = {NAMES.index("master24"): 1, NAMES.index("master32"): 2}

# Measured by copying on an H200, of 4.8e12 by its data sheet; and its boost clock.
H200_BYTES_PER_SECOND = 4.3e12
H200_INSTRUCTIONS_PER_SECOND = 132 * 128 * 1.755e9  # multiprocessors, threads a clock, clock

LATENCY = 700e-9  # seconds from a load to its data, under load


@dataclass(frozen=True)
class Gpu:
    """A GPU by its data sheet; a multiprocessor is called compute unit at AMD."""

    name: str
    multiprocessors: int
    bytes_per_second: float
    threads: int = 2048  # resident on a multiprocessor, at most
    quarter: int = 16384  # registers of each of its four schedulers
    warp: int = 32

    @property
    def needs_in_flight(self) -> float:
        """Bytes a multiprocessor must have in flight for full bandwidth (Little's law)."""
        return self.bytes_per_second * LATENCY / self.multiprocessors

    def blocks(self, registers: int, threads: int) -> int:
        """Blocks of so many threads that are resident; registers come in eights."""
        warps = 4 * (self.quarter // (-(-registers // 8) * 8 * self.warp))
        return min(warps * self.warp, self.threads) // threads


GPUS = {
    "sm_80": Gpu("A100", 108, 2.0e12),
    "sm_90": Gpu("H200", 132, 4.8e12),
    "sm_100": Gpu("B200", 148, 8.0e12),
    "sm_120": Gpu("RTX 5090", 170, 1.79e12, threads=1536),
    "gfx942": Gpu("MI300X", 304, 5.3e12, quarter=32768, warp=64),
}


@dataclass(frozen=True)
class Kernel:
    """A kernel's machine code, and what was measured on its main path.

    A step has the dtypes of param, grad and moments; the kernel of a norm has one dtype.
    """

    backend: str
    codes: Codes
    arch: str
    registers: int
    stack: int  # bytes, which spills would need too
    threads: int  # of a block
    code: list[Instruction] = field(repr=False)
    norm: float | None = None

    @property
    def dtypes(self) -> str:
        return "/".join(NAMES[code] for code in self.codes)

    @property
    def read(self) -> int:
        """Bytes of an element that are read: grad; for a step also param and both moments.

        Without the exponents of block8, one byte for 128 elements.
        """
        sizes = [SIZES[code] for code in self.codes]
        return sum(sizes) + (0 if self.norm else sizes[2] + REMAINDERS.get(self.codes[0], 0))

    @property
    def written(self) -> int:
        return 0 if self.norm else self.read - SIZES[self.codes[1]]

    @cached_property
    def main(self) -> list[Instruction]:
        return main_path(self.code)

    @property
    def local(self) -> int:
        """Instructions that access local memory, anywhere in the kernel."""
        return sum(one.local for one in self.code)

    @property
    def load_widths(self) -> list[int]:
        """Bytes of each load; the single bytes are exponents of block8."""
        return [one.loads for one in self.main if one.loads > 1]

    @property
    def store_widths(self) -> list[int]:
        return [one.stores for one in self.main if one.stores > 1]

    @property
    def elements(self) -> float:
        """That a thread steps on the main path."""
        return sum(self.load_widths) / self.read

    @property
    def instructions(self) -> float:
        """Of the main path, for each element."""
        return len(self.main) / self.elements if self.main else nan

    @property
    def blocks(self) -> int:
        return GPUS[self.arch].blocks(self.registers, self.threads)

    @property
    def in_flight(self) -> int:
        """Bytes that a multiprocessor's resident threads have loaded before they wait."""
        loaded, pending = 0, set()
        for one in self.main:
            used = set(re.findall(r"\bR\d+\b", one.operands))
            if pending & used or (pending and "vmcnt" in one.operands):
                break
            if one.loads:
                loaded += one.loads
                # The destination comes first: R4 of R4, [R2.64], or v[4:7] of AMD's.
                first = int(re.search(r"\d+", one.operands)[0])
                pending |= {f"R{first + i}" for i in range(one.loads // 4 or 1)}
        return loaded * self.blocks * self.threads


@lru_cache
def cuobjdump() -> str | None:
    """The toolkit's, or the one that comes with Triton."""
    triton = find_spec("triton")
    bundled = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton else None
    return shutil.which("cuobjdump") or (str(bundled) if bundled and bundled.exists() else None)


@lru_cache
def release() -> int:
    """The major version of cuobjdump, which reads no machine code of later ones."""
    printed = subprocess.run(
        [cuobjdump() or "cuobjdump", "--version"], capture_output=True, text=True
    )
    return int(re.findall(r"release (\d+)\.", printed.stdout)[0])


@lru_cache
def cuda_module() -> Path | None:
    module = modules.load_optional("_cuda")
    return Path(module.__file__) if module else None


def dump(file: Path, *what: str) -> str:
    """cuobjdump's report; it looks for nvdisasm, which lies beside it, on PATH."""
    tool = Path(cuobjdump() or "cuobjdump")
    path = f"{tool.parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [tool, *what, file], env=os.environ | {"PATH": path}, capture_output=True, text=True
    ).stdout


def cuda_architectures() -> list[str]:
    """For which the module holds machine code."""
    files = re.findall(r"\.(sm_\w+)\.cubin", dump(cuda_module(), "-lelf"))
    return list(dict.fromkeys(files))  # a source has a file for each


def norm_of(symbol: str) -> float | None:
    """From the mangled name of radam_norm_kernel<Norm, G>."""
    found = re.search(r"radam_norm_kernelILNS_4NormE(\d)E", symbol)
    return (1.0, 2.0, inf)[int(found[1])] if found else None


def dtypes_of(symbol: str) -> Codes | None:
    """From the mangled name of radam_step_kernel<P, G, S>, where S2_, S3_ repeat a type; or of
    radam_norm_kernel<Norm, G>."""
    found = re.search(r"radam_(?:step_kernelI|norm_kernelILNS_4NormE\dE)(.+)EEv", symbol)
    if not found:
        return None
    named: list[str] = []
    codes = []
    for builtin, name, again in re.findall(r"([fd])|NS_\d+([a-z]\w*?)E|S(\d)_", found[1] + "E"):
        if again:
            name = named[int(again) - 2]
        elif name:
            named.append(name)
        codes.append(NAMES.index(name or {"f": "float32", "d": "float64"}[builtin]))
    return tuple(codes)


def embedded_ptx() -> dict[Codes, str]:
    """The PTX of each step kernel that the CUDA module carries for GPUs to come."""
    entries = re.split(r"^\.(?:visible )?entry ", dump(cuda_module(), "-ptx"), flags=re.MULTILINE)
    named = ((dtypes_of(entry.partition("(")[0]), entry) for entry in entries[1:])
    return {codes: entry for codes, entry in named if codes and len(codes) == 3}


def read_sass(file: Path, arch: str, backend: str, codes: Codes | None = None) -> list[Kernel]:
    """The kernels of steps and norms in a module, or the one in a cubin, of dtypes `codes`."""
    usage = re.findall(
        r"Function (\S+):\s+REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)",
        dump(file, "-res-usage", "-arch", arch),
    )
    threads = {}
    for part in re.split(r"^\.nv\.info\.", dump(file, "-elf", "-arch", arch), flags=re.MULTILINE):
        limit = re.search(r"EIATTR_(?:MAX_THREADS|REQNTID)\n.*\n\s*Value:\s*0x([0-9a-f]+)", part)
        threads[part.split()[0]] = int(limit[1], 16) if limit else 1024
    parts = re.split(r"^\s*Function : ", dump(file, "-sass", "-arch", arch), flags=re.MULTILINE)
    sass = {part.split()[0]: part for part in parts[1:]}
    kernels = []
    for symbol, registers, stack, local in usage:
        dtypes = codes or dtypes_of(symbol)
        if dtypes:
            code = parse_sass(sass[symbol])
            bytes_ = int(stack) + int(local)
            norm = norm_of(symbol) or (2.0 if len(dtypes) == 1 else None)
            kernels.append(
                Kernel(backend, dtypes, arch, int(registers), bytes_, threads[symbol], code, norm)
            )
    return kernels


def read_triton(compiled: Compiled) -> Kernel:
    if "cubin" in compiled.files:
        file = Path(compiled.files["cubin"])
        return read_sass(file, compiled.arch, "triton", compiled.codes)[0]
    text = compiled.text("amdgcn")

    def number(name: str) -> int:
        return int(re.search(rf"{name}:?\s+(\d+)", text)[1])

    registers, stack = number("TotalNumVgprs"), number("ScratchSize")
    threads = number(r"\.max_flat_workgroup_size")
    code = parse_amdgcn(text)
    norm = 2.0 if len(compiled.codes) == 1 else None
    return Kernel("triton", compiled.codes, compiled.arch, registers, stack, threads, code, norm)


def affordable(bytes_: int) -> float:
    """Instructions that an H200 can issue in the time in which it moves so many bytes."""
    return bytes_ / H200_BYTES_PER_SECOND * H200_INSTRUCTIONS_PER_SECOND


def table(kernels: Iterable[Kernel]) -> str:
    """A line for each kernel. Of bytes and instructions: for an element; in flight: kB."""
    return pd.DataFrame(
        {
            "param/grad/moments": k.dtypes if k.norm is None else f"norm {k.norm:g} of {k.dtypes}",
            "bytes": k.read + k.written,
            "kernel": k.backend,
            "arch": k.arch,
            "registers": k.registers,
            "stack": k.stack,
            "local": k.local,
            "loads": " ".join(f"{n}x{w}" for w, n in sorted(Counter(k.load_widths).items())),
            "stores": " ".join(f"{n}x{w}" for w, n in sorted(Counter(k.store_widths).items())),
            "elements": k.elements,
            "instructions": round(k.instructions, 1),
            "affordable": round(affordable(k.read + k.written)) if k.arch == "sm_90" else "",
            "threads": k.blocks * k.threads,
            "in flight": round(k.in_flight / 1e3),
            "needs": round(GPUS[k.arch].needs_in_flight / 1e3),
        }
        for k in kernels
    ).to_markdown(index=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--all", action="store_true", help="every dtype set of the CUDA kernel")
    args = parser.parse_args()
    if not cuobjdump():
        parser.error("no cuobjdump on PATH, and none beside Triton: pip install triton")
    kernels, notes = [], []
    if cuda_module():
        for arch in cuda_architectures():
            if arch in GPUS:
                kernels += read_sass(cuda_module(), arch, "cuda")
    else:
        notes.append("cuda: _cuda was not built here")
    with tempfile.TemporaryDirectory() as folder:
        for compiled in compile_all(Path(folder)):
            kernels.append(read_triton(compiled))
    shown = [k for k in kernels if args.all or k.codes in (*SETS, *NORM_SETS)]
    shown.sort(key=lambda k: (len(k.codes) == 1, k.codes, k.backend))
    print(table(shown), *notes, sep="\n")


if __name__ == "__main__":
    main()
