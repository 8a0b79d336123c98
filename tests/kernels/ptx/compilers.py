"""The PTX of the kernels: nvcc's by the flags of the build, Triton's as its launches ask for it."""

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from radam_kernels.modules import FORMAT_NAMES
from tests.helpers import LOW_MEMORY_SETS
from tests.kernels.norms import NORMS

from .program import Program, parse

ROOT = Path(__file__).parents[3]
Codes = tuple[int, int, int]  # of param, grad and moments: indices of helpers.FORMAT_NAMES

_TYPES = {f"radam::{name}": code for code, name in enumerate(FORMAT_NAMES)}
_TYPES |= {"float": FORMAT_NAMES.index("float32"), "double": FORMAT_NAMES.index("float64")}


class Compiled(NamedTuple):
    """One kernel as PTX."""

    name: str
    file: str  # a name for the file
    text: str  # the whole file, so that its line numbers hold
    shared: int = 0  # bytes of shared memory that a launch asks for

    def program(self) -> Program:
        [program] = [one for one in parse(self.text) if one.name == self.name]
        return program


@cache
def nvcc(arch: str, source: str = "step_cuda") -> dict[Any, Compiled]:
    """The CUDA kernels of one file.

    Returns: of step_cuda "advance", "upload", and the steps by their dtype codes; of
        low_memory_cuda the steps of its formats; of norm_cuda the norms by code and norm, and the
        totals by whether they are of the largest.
    """
    build = (ROOT / "CMakeLists.txt").read_text()
    flags = re.search(r"COMPILE_LANGUAGE:CUDA>:(.*?)>\)", build, re.DOTALL)[1].rstrip(">").split()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / f"{source}.ptx"
        command = ["nvcc", "-ptx", f"-arch=compute_{arch}", "-std=c++17", *flags]
        command += [f"-I{ROOT / 'csrc'}", str(ROOT / f"csrc/cuda/{source}.cu"), "-o", str(out)]
        subprocess.run(command, check=True, stdout=sys.stderr)
        text = out.read_text()
    mangled = [program.name for program in parse(text)]
    names = subprocess.run(
        ["c++filt"], input="\n".join(mangled), text=True, capture_output=True, check=True
    ).stdout.splitlines()
    kernels = {}
    for symbol, name in zip(mangled, names, strict=True):
        kind, arguments = re.search(r"radam_(\w+)_kernel(?:<(.*?)>)?\(", name).groups()
        if kind == "step":
            key = tuple(_TYPES[t.strip()] for t in arguments.split(","))
        elif kind == "norm":
            norm, dtype = re.fullmatch(r"\(radam::Norm\)(\d), (.*)", arguments).groups()
            key = _TYPES[dtype], NORMS[int(norm)]
        else:
            key = arguments == "true" if kind == "norm_total" else kind
        kernels[key] = Compiled(symbol, f"{source}-{arch}.ptx", text)
    return kernels


@cache
def triton_step(codes: Codes, arch: str, factor: bool) -> Compiled:
    """What launch_() compiles."""
    from radam_kernels.backends import triton_kernel

    *tables, low_memory = (torch.zeros(1, dtype=torch.int64) for _ in range(5))
    number = torch.zeros(1, dtype=torch.float64) if factor else None
    extra = low_memory if codes in LOW_MEMORY_SETS else None
    return _compile_launch(
        "radam_step_kernel",
        arch,
        lambda: triton_kernel.launch_(*tables, number, 0, 1, codes, extra),
    )


@cache
def triton_norm(dtype: int, norm_type: float, arch: str) -> tuple[Compiled, Compiled]:
    """What launch_power_sum() compiles: the kernel of the partial sums, and that of the total."""
    from radam_kernels.backends import triton_kernel

    tables = [torch.zeros(1, dtype=torch.int64) for _ in range(2)]
    return tuple(
        _compile_launch(
            name, arch, lambda: triton_kernel.launch_power_sum(*tables, 0, 1, dtype, norm_type)
        )
        for name in ("radam_norm_kernel", "radam_norm_total_kernel")
    )


@cache
def triton_upload(arch: str) -> Compiled:
    """What upload_by_arguments() compiles."""
    from radam_kernels.backends import triton_kernel

    upload = triton_kernel.upload_by_arguments(torch.device("cpu"))
    return _compile_launch("radam_upload_kernel", arch, lambda: upload(bytes(8)))


class _Recorder:
    """Stands in for a kernel, and keeps what it is launched with."""

    def __getitem__(self, grid: object) -> "_Recorder":
        return self

    def __call__(self, *args: Any, **options: Any) -> None:
        self.args, self.options = args, options


def _compile_launch(name: str, arch: str, launch: Callable[[], object]) -> Compiled:
    """Compiles what `launch` launches the kernel `name` with, for tensors on 16 bytes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from radam_kernels.backends import triton_kernel

    kernels = {n: k for n, k in vars(triton_kernel).items() if n.startswith("radam_")}
    recorders = {n: _Recorder() for n in kernels}
    with patch.multiple(triton_kernel, **recorders):
        launch()
    kernel, recorder = kernels[name], recorders[name]
    pointers = {torch.int64: "*i64", torch.int32: "*i32", torch.float64: "*fp64"}
    signature, constants, attributes = {}, {}, {}
    for i, (parameter, arg) in enumerate(zip(kernel.params, recorder.args, strict=True)):
        if parameter.is_constexpr:
            signature[parameter.name], constants[(i,)] = "constexpr", arg
        elif arg is None:
            signature[parameter.name], constants[(i,)] = "constexpr", None
        elif torch.is_tensor(arg):
            signature[parameter.name] = pointers[arg.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            assert parameter.do_not_specialize, f"{parameter.name} has a kernel for each value"
            signature[parameter.name] = "i32"
    source = ASTSource(kernel, signature, constants, attributes)
    target = GPUTarget("cuda", int(arch), 32)
    built = triton.compile(source, target=target, options=recorder.options)
    values = "-".join(str(value) for value in constants.values())
    file = f"{name}-{arch}-{values}.ptx" if values else f"{name}-{arch}.ptx"
    return Compiled(name, file, built.asm["ptx"], built.metadata.shared)
