"""Segments in guarded memory, and every kernel that steps them, behind one signature."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

import radam_kernels
from radam_kernels import backends, formats, schedule
from radam_kernels.backends import triton_, upload
from radam_kernels.modules import cpu
from radam_kernels.scaling import address
from radam_kernels.schedule import Action
from tests.helpers import GPU, USUAL

FORMS = {
    "plain": {},
    "L2": dict(weight_decay=0.1),
    "decoupled": dict(weight_decay=0.1, decoupled_weight_decay=True),
    "maximize": dict(maximize=True, weight_decay=0.1, grad_scale=1 / 1024),
}
HOLD = schedule.step_scalars(1, **USUAL, degenerated_to_sgd=False)
MOMENTUM = schedule.step_scalars(1, **USUAL)
RECTIFIED = schedule.step_scalars(8, **USUAL)
SKIP = RECTIFIED._replace(action=float(Action.SKIP))
# Every form in every action.
SCALARS = [
    *(schedule.step_scalars(8, **USUAL, **form) for form in FORMS.values()),
    *(schedule.step_scalars(1, **USUAL, **form) for form in FORMS.values()),
    *(
        schedule.step_scalars(1, **USUAL, **form, degenerated_to_sgd=False)
        for form in FORMS.values()
    ),
    SKIP,
]
STREAMS = ("param", "grad", "exp_avg", "exp_avg_sq")
FIELDS = cpu.segment_fields
NUMEL = FIELDS.index("numel")
SENTINEL = 0xA5

Codes = tuple[int, int, int]


@dataclass
class Kernel:
    """A way to step: `launch(rows, grads, low memory, dtype codes, scalars)`.

    Tables are numpy arrays; that of low memory is empty for plain dtypes.
    """

    name: str
    device: str
    launch: Callable[[np.ndarray, np.ndarray, np.ndarray, Codes, np.ndarray], None]


def cpu_kernel(isa: int, threads: int) -> Kernel:
    def launch(rows, grads, low_memory, codes, scalars):
        cpu.step(
            rows.ctypes.data, grads.ctypes.data, len(rows), *codes,
            scalars.ctypes.data, len(scalars), threads, isa,
            low_memory.ctypes.data if len(low_memory) else 0,
        )  # fmt: skip

    return Kernel(f"cpu, {cpu.instruction_sets[isa]}, {threads} threads", "cpu", launch)


def triton_kernel() -> Kernel:
    device = "cpu" if triton_.INTERPRETED else "cuda"

    def launch(rows, grads, low_memory, codes, scalars):
        blocks, run, work = upload.plan(rows[:, NUMEL], triton_.triton_kernel.CHUNK)
        tables = (torch.from_numpy(t).to(device) for t in (rows, grads, work, scalars))
        extra = torch.from_numpy(low_memory.view(np.int64)).to(device) if len(low_memory) else None
        triton_.launch_(*tables, None, run, blocks, codes, extra)

    return Kernel("triton", device, launch)


def cuda_kernel() -> Kernel:
    def launch(rows, grads, low_memory, codes, scalars):
        module = backends.cuda._cuda
        blocks, run, work = upload.plan(rows[:, NUMEL], module.chunk(*codes))
        tables = [torch.from_numpy(t).cuda() for t in (rows, grads, work, scalars)]
        extra = torch.from_numpy(low_memory.view(np.int64)).cuda() if len(low_memory) else None
        segments, grads, work, scalars_ = (t.data_ptr() for t in tables)
        module.step(
            segments, grads, address(extra), work, run, blocks, *codes, 0, 0, scalars_, 0, 0, 0
        )
        torch.cuda.synchronize()

    return Kernel("cuda", "cuda", launch)


def cpu_kernels() -> list[Kernel]:
    isas = range(len(cpu.instruction_sets))
    return [cpu_kernel(isa, threads) for isa in isas for threads in (1, 2, 3)]


MAKE = {"cpu": cpu_kernels, "triton": lambda: [triton_kernel()], "cuda": lambda: [cuda_kernel()]}
CUDA, TRITON = (pytest.param(name, marks=GPU, id=f"{name} on a GPU") for name in ("cuda", "triton"))


def make_kernels(name: str) -> list[Kernel]:
    if reason := radam_kernels.available_backends()[name]:
        pytest.skip(reason)
    return MAKE[name]()


Tensors = tuple[Tensor | None, ...]


class Arena:
    """Segments in one block of memory, each stream between guard bytes.

    Args:
        segments: (param, grad, exp_avg, exp_avg_sq) of each, one-dimensional on the CPU; formats
            for low memory have a remainder and two tensors of exponents in addition, or None.
        device: where the block is.
        offsets: for each segment, how many elements each stream starts past a multiple of 64 bytes.
    """

    def __init__(self, segments: Sequence[Tensors], device: str, offsets=None) -> None:
        self.places: list[list[tuple[int, int, torch.dtype] | None]] = []
        end = 64
        for i, streams in enumerate(segments):
            places = []
            for j, stream in enumerate(streams):
                if stream is None:
                    places.append(None)
                    continue
                begin = end + (offsets[i][j] * stream.element_size() if offsets else 0)
                places.append((begin, begin + stream.nbytes, stream.dtype))
                end = -(-(begin + stream.nbytes) // 64) * 64 + 64
            self.places.append(places)
        memory = np.full(end, SENTINEL, np.uint8)
        self.guards = np.ones(end, bool)
        for places, streams in zip(self.places, segments, strict=True):
            for place, stream in zip(places, streams, strict=True):
                if place is not None:
                    begin, stop, _ = place
                    memory[begin:stop] = stream.view(torch.uint8).numpy()
                    self.guards[begin:stop] = False
        self.memory = torch.empty(end, dtype=torch.uint8, device=device)
        self.memory.copy_(torch.from_numpy(memory))
        assert self.memory.data_ptr() % 64 == 0

    def tables(
        self, scalars: Sequence[int], extras: Sequence[formats.LowMemory] = ()
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows of FIELDS, each segment with its row of scalars; gradients; rows for low memory.

        Args:
            extras: the index of the first element and the key of each segment in a format for low
                memory. Their tensors are those of the arena.
        """
        base = self.memory.data_ptr()
        rows, grads, low_memory = [], [], []
        for i, (places, row) in enumerate(zip(self.places, scalars, strict=True)):
            begin, stop, dtype = places[0]
            numel = (stop - begin) // dtype.itemsize
            addresses = [0 if place is None else base + place[0] for place in places]
            param, grad, exp_avg, exp_avg_sq = addresses[:4]
            rows.append([param, exp_avg, exp_avg_sq, numel, row])
            grads.append(grad)
            if extras:
                low_memory.append([*addresses[4:], extras[i].first_index, extras[i].key])
        return (
            np.array(rows, dtype=np.int64),
            np.array(grads, dtype=np.int64),
            np.array(low_memory, dtype=np.uint64),
        )

    def read(self) -> list[Tensors]:
        memory = self.memory.cpu()
        assert (memory.numpy()[self.guards] == SENTINEL).all(), (
            "a byte outside the segments was written"
        )
        return [
            tuple(place and memory[place[0] : place[1]].view(place[2]) for place in places)
            for places in self.places
        ]
