"""What memory can do with the bytes of a step: an in-place loop on the CPU, a copy on a GPU.

bench/roofline.cpp is compiled at its first use. It reads p, g, m and v and writes p, m and v where
they are, as STREAM would, and changes no value: so it runs on the very tensors that an
optimizer steps, between its steps, on the same threads.
"""

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.utils import cpp_extension

from radam_kernels.modules import DTYPES, cpu

from .cases import local
from .optimizers import Optimizer

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("bench/roofline.cpp", "csrc/cpu/launch_cpu.cpp", "csrc/cpu/threads.cpp")
STREAM, COPY = "stream of", "copy of"


def limit_name(moved: int, kind: str) -> str:
    return f"{kind} {moved} B"


def limit(moved: int, kind: str, optimizer: Callable[[], object] = lambda: None) -> Optimizer:
    """A row that only moves so many bytes for each element, of the optimizer's moments if it has
    started."""

    def make(params: Sequence[Tensor], lr: float) -> "Stream | Copy":
        if kind == COPY:
            return Copy(params, moved)
        return Stream(*streams(params, moved, getattr(optimizer(), "state", {})))

    name = limit_name(moved, kind)
    return Optimizer(name, make, lambda size: moved, level=0, any_gradient=True)


class Copy:
    """Copies half of the bytes, so that all are read or written."""

    def __init__(self, params: Sequence[Tensor], moved: int) -> None:
        half = sum(param.numel() for param in params) * moved // 2
        self._source = torch.empty(half, dtype=torch.uint8, device=params[0].device).random_()
        self._target = torch.zeros_like(self._source)

    def step(self) -> None:
        self._target.copy_(self._source)


class Stream:
    """A loop over the tensors of a step, which must stay where they are.

    Args:
        lists: parameters, gradients and both moments, of equal length, on the CPU. Tensors without
            gaps in memory, of one dtype in a list.
    """

    def __init__(self, *lists: Sequence[Tensor]) -> None:
        self._library = library()
        self._tensors = lists  # the tables hold addresses only
        self._segments = (Segment * len(lists[0]))(*map(_segment, *lists))
        self._grads = (ctypes.c_void_p * len(lists[1]))(*(grad.data_ptr() for grad in lists[1]))
        self._codes = [DTYPES.index(tensors[0].dtype) for tensors in lists[:3]]

    def step(self, mask: int = 0) -> None:
        """One pass; adds the bits of g under the mask to p, m and v, as integers."""
        threads, count = torch.get_num_threads(), len(self._segments)
        self._library.radam_stream(self._segments, self._grads, count, *self._codes, threads, mask)


class Segment(ctypes.Structure):
    """As in csrc/core/segment.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("param", "exp_avg", "exp_avg_sq")),
        *((name, ctypes.c_int64) for name in ("numel", "scalars")),
    ]


def _segment(param: Tensor, _: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> Segment:
    addresses = (tensor.data_ptr() for tensor in (param, exp_avg, exp_avg_sq))
    return Segment(*addresses, param.numel(), 0)


def streams(params: Sequence[Tensor], moved: int, state: dict[Tensor, dict]) -> list[list[Tensor]]:
    """The tensors of a step that moves so many bytes, with new moments where there are none."""
    dtype, grad_dtype = params[0].dtype, params[0].grad.dtype
    others = 2 * dtype.itemsize + grad_dtype.itemsize
    possible = (dtype, torch.promote_types(dtype, torch.float32))
    moments = [d for d in possible if moved == others + 4 * d.itemsize]
    if not moments:
        raise ValueError(f"no loop moves {moved} bytes for each element of {dtype}")

    def moment(param: Tensor, key: str) -> Tensor:
        found = state.get(param, {}).get(key)
        fits = found is not None and (found.dtype, found.shape) == (moments[0], param.shape)
        return found if fits else torch.zeros_like(param, dtype=moments[0])

    lists = [params, [param.grad for param in params]]
    lists += [[moment(param, key) for param in params] for key in ("exp_avg", "exp_avg_sq")]
    return [[local(tensor.detach()) for tensor in tensors] for tensors in lists]


@cache
def library() -> ctypes.CDLL:
    """The compiled loop, for the instruction set of the CPU kernel."""
    best = cpu.instruction_sets[0]
    march = [] if best == "baseline" else [f"-march={best}"]
    file = cpp_extension.load(
        f"radam_roofline_{best.replace('-', '_')}",
        [str(ROOT / source) for source in SOURCES],
        extra_cflags=["-O3", "-fopenmp-simd", "-std=c++17", *march],
        extra_include_paths=[str(ROOT / "csrc")],
        is_python_module=False,
    )
    loaded = ctypes.CDLL(file)
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    counts = [pointer, pointer, ctypes.c_int64, *4 * [integer], ctypes.c_uint64]
    loaded.radam_stream.argtypes, loaded.radam_stream.restype = counts, None
    return loaded
