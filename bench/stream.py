"""The limit of a CPU: what an in-place loop over the same streams takes, on the same threads.

bench/stream.cpp is compiled at its first use. It reads p, g, m and v and writes p, m and v where
they are, as STREAM would, and leaves every value as it was: so it runs on the very tensors that an
optimizer steps, between its steps. Where it can't be compiled, `why_not` says why.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from radam_kernels.modules import cpu

from .folders import ROOT

SOURCES = ("bench/stream.cpp", "csrc/cpu/launch_cpu.cpp", "csrc/cpu/threads.cpp")
# The kernel's own (CMakeLists.txt), so that divisions and square roots are compiled alike; and the
# one by which these loops become vectors.
FLAGS = (
    "-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",
    "-fopenmp-simd", "-shared", "-fPIC", "-pthread",
)  # fmt: skip
WIDTHS = ((4, 4, 4, 4), (2, 2, 4, 4), (2, 2, 2, 2), (8, 8, 8, 8))
SECONDS = 0.1  # for the ceiling of divisions
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


class Segment(ctypes.Structure):
    """As in csrc/core/segment.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("param", "exp_avg", "exp_avg_sq")),
        ("numel", ctypes.c_int64),
        ("scalars", ctypes.c_int64),
    ]  # fmt: skip


class Stream:
    """A loop over the streams of a step; the tensors must stay where they are.

    Args:
        params, grads, exp_avgs, exp_avg_sqs: lists of equal length; tensors of one dtype for the
            first two and of one for the others, without gaps in memory, on the CPU.

    Raises:
        RuntimeError: where the loop can't be compiled.
        ValueError: for tensors of another kind.
    """

    def __init__(self, *lists: Sequence[Tensor]) -> None:
        if reason := why_not():
            raise RuntimeError(reason)
        self._tensors = lists  # a segment holds addresses only
        rows = list(zip(*lists, strict=True))
        kinds = {tuple(t.dtype for t in row) for row in rows}
        if len(kinds) != 1:
            raise ValueError(f"dtypes: expected the same in every row, got {kinds}")
        (kind,) = kinds
        widths = tuple(dtype.itemsize for dtype in kind)
        if widths not in WIDTHS:
            raise ValueError(f"dtypes: expected one of {WIDTHS} bytes, got {widths}")
        self._param, self._state = _DTYPES[kind[0]], _DTYPES[kind[2]]
        self._segments = (Segment * len(rows))(*map(_segment, rows))
        self._grads = (ctypes.c_void_p * len(rows))(*(grad.data_ptr() for _, grad, _, _ in rows))
        self.elements = sum(row[0].numel() for row in rows)
        self.bytes = self.elements * (3 * kind[0].itemsize + 4 * kind[2].itemsize)

    def __call__(self, mask: int = 0) -> None:
        """One pass; adds the bits of g under the mask to p, m and v, as integers."""
        _library().radam_stream(
            self._segments,
            self._grads,
            len(self._segments),
            self._param,
            self._state,
            threads(),
            mask,
        )


def _segment(row: tuple[Tensor, ...]) -> Segment:
    for tensor in row:
        if tensor.device.type != "cpu" or tensor.numel() != row[0].numel():
            raise ValueError(f"expected CPU tensors of one size in a row, got {tensor.shape}")
        dense = sorted(zip(tensor.stride(), tensor.shape, strict=True))
        expected = 1
        for stride, size in dense:
            if size != 1 and stride != expected:
                raise ValueError(f"strides: expected no gaps, got {tensor.stride()}")
            expected *= size
    param, _, exp_avg, exp_avg_sq = (t.data_ptr() for t in row)
    return Segment(param, exp_avg, exp_avg_sq, row[0].numel(), 0)


def threads() -> int:
    """As many as the optimizer takes."""
    return torch.get_num_threads()


def divisions(dtype: torch.dtype) -> float:
    """How many times a second all threads together compute m / (sqrt(v) + eps) in cache.

    Raises RuntimeError where it can't be compiled.
    """
    if reason := why_not():
        raise RuntimeError(reason)
    size = 8 if dtype == torch.float64 else 4
    passes, best = 100, 0.0
    begin = time.perf_counter()
    while time.perf_counter() - begin < SECONDS:
        before = time.perf_counter()
        each = _library().radam_divide(size, threads(), passes)
        took = time.perf_counter() - before
        best = max(best, threads() * each / took)
        passes = passes if took > SECONDS / 10 else 2 * passes
    return best


@cache
def why_not() -> str | None:
    """Why there is no limit to be measured on this machine; None if there is."""
    try:
        _library()
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        return f"no streaming loop: {error}"
    return None


def march() -> tuple[str, ...]:
    """The flag for the instruction set that the CPU kernel runs on here."""
    best = cpu.instruction_sets[0]
    return () if best == "baseline" else (f"-march={best}",)


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(build()))
    pointer, integer, number = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    library.radam_stream.argtypes = [
        pointer, pointer, number, integer, integer, integer, ctypes.c_uint64,
    ]  # fmt: skip
    library.radam_stream.restype = None
    library.radam_divide.argtypes = [integer, integer, number]
    library.radam_divide.restype = number
    library.radam_threads_from.restype = ctypes.c_char_p
    return library


def threads_from() -> str:
    """Where the loop's threads come from: where the optimizer's come from."""
    return _library().radam_threads_from().decode()


def command(compiler: str, file: Path) -> list[str]:
    """Compiles the loop into a file."""
    sources = [str(ROOT / source) for source in SOURCES]
    return [compiler, *FLAGS, *march(), f"-I{ROOT / 'csrc'}", *sources, "-ldl", "-o", str(file)]


def build() -> Path:
    """The shared library, from the cache if it is there; RuntimeError if it does not compile."""
    wanted = os.environ.get("CXX", "g++")
    if not (compiler := shutil.which(wanted)):
        raise RuntimeError(f"no C++ compiler: {wanted} is not there; install g++, or set CXX")
    digest = hashlib.sha256(" ".join(command(compiler, Path())).encode())
    for file in (*(ROOT / "csrc").rglob("*.h"), *(ROOT / source for source in SOURCES)):
        digest.update(file.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"radam_bench-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise RuntimeError(f"{folder} belongs to somebody else; remove it, or set TMPDIR")
    file = folder / f"stream-{digest.hexdigest()[:16]}.so"
    if not file.exists():
        new = file.with_suffix(f".{os.getpid()}")  # another process may be at it, too
        said = subprocess.run(
            command(compiler, new), capture_output=True, text=True, timeout=120, check=False
        )
        if said.returncode:
            raise RuntimeError(f"{compiler} failed: {said.stderr.strip()[:500]}")
        os.replace(new, file)
    return file
