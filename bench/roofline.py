"""What memory can do with the bytes of a step: an in-place loop on the CPU, a copy on a GPU.

bench/roofline.cpp is compiled at its first use. It reads p, g, m and v and writes p, m and v where
they are, as STREAM would, and leaves every value as it was: so it runs on the very tensors that an
optimizer steps, between its steps, on the same threads.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from radam_kernels.flat import is_dense
from radam_kernels.modules import cpu

from .optimizers import Session

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("bench/roofline.cpp", "csrc/cpu/launch_cpu.cpp", "csrc/cpu/threads.cpp")
# The kernel's own (CMakeLists.txt), so that divisions and square roots are compiled alike; and the
# one by which these loops become vectors.
FLAGS = (
    "-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",
    "-fopenmp-simd", "-shared", "-fPIC", "-pthread",
)  # fmt: skip
SECONDS = 0.1  # for the speed of divisions
SIZES = ((4, 4, 4), (2, 2, 4), (2, 2, 2), (4, 2, 4), (8, 8, 8))  # bytes of p, g, and m and v
_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


@dataclass(frozen=True)
class Limit:
    """A row that only moves as many bytes for each element as a step must."""

    bytes: int
    kind: str  # "stream of" or "copy of"
    level: int = 0

    @property
    def name(self) -> str:
        return limit_name(self.bytes, self.kind)

    def start(
        self, params: Sequence[Tensor], optimizer: torch.optim.Optimizer | None = None
    ) -> Session:
        """Ready to run, on the moments of the optimizer if it has any of the right size.

        Raises:
            RuntimeError: where the loop can't be compiled.
            ValueError: where there is no loop that moves so many bytes.
        """
        if self.kind == COPY:
            half = sum(param.numel() for param in params) * self.bytes // 2
            source = torch.empty(half, dtype=torch.uint8, device=params[0].device).random_()
            target = torch.zeros_like(source)
            return Session(lambda: target.copy_(source), None, params)
        moments = moment_dtype(self.bytes, params[0])
        return Session(Stream(*streams(params, optimizer, moments)), None, params)

    def floor(self, params: Sequence[Tensor]) -> float:
        """Seconds that divisions and square roots take in cache.

        With moments of 16 bits, memory may have less to do than the processor.
        """
        if self.kind == COPY or moment_dtype(self.bytes, params[0]).itemsize > 2:
            return 0.0
        return sum(param.numel() for param in params) / divisions(params[0].dtype)


COPY, STREAM = "copy of", "stream of"


def limit_name(moved: int, kind: str) -> str:
    return f"{kind} {moved} B"


class Stream:
    """A loop over the tensors of a step, which must stay where they are.

    Args:
        params, grads, exp_avgs, exp_avg_sqs: lists of equal length; tensors of one dtype for the
            first two and of one for the others, without gaps in memory, on the CPU.

    Raises:
        RuntimeError: where the loop can't be compiled.
        ValueError: for other tensors.
    """

    def __init__(self, *lists: Sequence[Tensor]) -> None:
        self._library = library()
        self._tensors = lists  # the tables hold addresses only
        rows = list(zip(*lists, strict=True))
        kinds = {tuple(tensor.dtype for tensor in row) for row in rows}
        if len(kinds) != 1:
            raise ValueError(f"dtypes: expected the same in every row, got {kinds}")
        (kind,) = kinds
        if kind[2] != kind[3] or tuple(dtype.itemsize for dtype in kind[:3]) not in SIZES:
            raise ValueError(f"dtypes: expected sizes in {SIZES}, got {kind}")
        for row in rows:
            if any(not is_dense(t) or t.numel() != row[0].numel() or t.is_cuda for t in row):
                raise ValueError("expected CPU tensors of one size in a row, without gaps")
        self._segments = (Segment * len(rows))(*map(_segment, rows))
        self._grads = (ctypes.c_void_p * len(rows))(*(grad.data_ptr() for grad in lists[1]))
        self._codes = [_CODES[dtype] for dtype in kind[:3]]

    def __call__(self, mask: int = 0) -> None:
        """One pass; adds the bits of g under the mask to p, m and v, as integers."""
        threads, count = torch.get_num_threads(), len(self._segments)
        self._library.radam_stream(self._segments, self._grads, count, *self._codes, threads, mask)


class Segment(ctypes.Structure):
    """As in csrc/core/segment.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("param", "exp_avg", "exp_avg_sq")),
        *((name, ctypes.c_int64) for name in ("numel", "scalars")),
    ]


def _segment(row: Sequence[Tensor]) -> Segment:
    param, _, exp_avg, exp_avg_sq = (tensor.data_ptr() for tensor in row)
    return Segment(param, exp_avg, exp_avg_sq, row[0].numel(), 0)


def streams(
    params: Sequence[Tensor], optimizer: torch.optim.Optimizer | None, dtype: torch.dtype
) -> list[list[Tensor]]:
    """The tensors of a step; new moments where the optimizer has none of that dtype."""

    def moment(param: Tensor, key: str) -> Tensor:
        found = optimizer.state[param].get(key) if optimizer else None
        if found is None or found.dtype != dtype or found.numel() != param.numel():
            return torch.zeros_like(param, dtype=dtype, requires_grad=False)
        return found

    moments = ([moment(param, key) for param in params] for key in ("exp_avg", "exp_avg_sq"))
    return [
        [_local(tensor.detach()) for tensor in tensors]
        for tensors in (params, [param.grad for param in params], *moments)
    ]


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def moment_dtype(moved: int, param: Tensor) -> torch.dtype:
    """Of moments that make a step move so many bytes for each element of the parameter."""
    dtype = param.dtype
    others = 2 * dtype.itemsize + param.grad.dtype.itemsize
    for moments in (dtype, torch.float64 if dtype == torch.float64 else torch.float32):
        if moved == others + 4 * moments.itemsize:
            return moments
    raise ValueError(f"no loop moves {moved} bytes for each element of {dtype}")


@cache
def divisions(dtype: torch.dtype) -> float:
    """How many times a second all threads together compute m / (sqrt(v) + eps) in cache."""
    size, threads = 8 if dtype == torch.float64 else 4, torch.get_num_threads()
    passes, best = 100, 0.0
    begin = time.perf_counter()
    while time.perf_counter() - begin < SECONDS:
        before = time.perf_counter()
        each = library().radam_divide(size, threads, passes)
        took = time.perf_counter() - before
        best = max(best, threads * each / took)
        passes = passes if took > SECONDS / 10 else 2 * passes
    return best


@cache
def library() -> ctypes.CDLL:
    """The compiled loops; RuntimeError where they can't be compiled."""
    try:
        loaded = ctypes.CDLL(str(build()))
    except (OSError, subprocess.SubprocessError) as error:
        raise RuntimeError(f"no streaming loop: {error}") from error
    pointer, integer, number = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    loaded.radam_stream.argtypes = [
        pointer, pointer, number, *4 * [integer], ctypes.c_uint64
    ]  # fmt: skip
    loaded.radam_stream.restype = None
    loaded.radam_divide.argtypes = [integer, integer, number]
    loaded.radam_divide.restype = number
    return loaded


def command(compiler: str, file: Path) -> list[str]:
    """Compiles the loops for the instruction set that the CPU kernel runs on here."""
    best = cpu.instruction_sets[0]
    march = () if best == "baseline" else (f"-march={best}",)
    sources = [str(ROOT / source) for source in SOURCES]
    return [compiler, *FLAGS, *march, f"-I{ROOT / 'csrc'}", *sources, "-ldl", "-o", str(file)]


def build() -> Path:
    """The shared library, from the cache if it is there; RuntimeError if it does not compile."""
    wanted = os.environ.get("CXX", "g++")
    if not (compiler := shutil.which(wanted)):
        raise RuntimeError(f"no streaming loop: no C++ compiler {wanted}; install g++, or set CXX")
    digest = hashlib.sha256(" ".join(command(compiler, Path())).encode())
    for file in (*(ROOT / "csrc").rglob("*.h"), *(ROOT / source for source in SOURCES)):
        digest.update(file.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"radam_bench-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise RuntimeError(f"{folder} belongs to another user; remove it, or set TMPDIR")
    file = folder / f"roofline-{digest.hexdigest()[:16]}.so"
    if not file.exists():
        new = file.with_suffix(f".{os.getpid()}")  # another process may be building, too
        compiled = subprocess.run(
            command(compiler, new), capture_output=True, text=True, timeout=120, check=False
        )
        if compiled.returncode:
            raise RuntimeError(f"no streaming loop: {compiler}: {compiled.stderr.strip()[:500]}")
        os.replace(new, file)
    return file
