"""What a launch is given: segments of many sizes and alignments, with scalars of every action."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from radam_kernels import schedule
from radam_kernels.backends import reference
from radam_kernels.modules import DTYPES, cpu
from radam_kernels.schedule import Action, StepScalars

from .compilers import Codes

SIZES = (0, 1, 3, 4, 5, 255, 256, 257, 4095, 4096, 4097, 8192, 8193, 20000)
STREAMS = ("param", "grad", "exp_avg", "exp_avg_sq")
INTS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
F64 = DTYPES.index(torch.float64)
UINTS = {2: np.uint16, 4: np.uint32, 8: np.uint64}

Streams = list[np.ndarray]  # STREAMS of one segment, as bits


@dataclass
class Case:
    """One launch."""

    codes: Codes
    offsets: list[tuple[int, ...]]  # in elements, of where each stream starts behind 16 bytes
    segments: list[Streams]
    scalars: list[StepScalars]
    rows: list[int]  # the row of scalars that each segment obeys
    work_rows: int = 4096  # the most rows of work
    on_device: bool = False  # whether the scalars are there, or are arguments of the launch
    factor: float | None = None  # on the device: multiplies the gradients

    @property
    def sizes(self) -> list[int]:
        return [len(streams[0]) for streams in self.segments]

    @property
    def effective(self) -> list[StepScalars]:
        """The rows of scalars with the factor, which those of a launch meet when narrowed."""
        if self.factor is None:
            return self.scalars
        narrow = float if self.on_device or self.codes[0] == F64 else np.float32
        return [
            row._replace(grad_scale=float(narrow(row.grad_scale)) * self.factor)
            for row in self.scalars
        ]

    def action(self, segment: int) -> float:
        return self.scalars[self.rows[segment]].action


def stream_codes(codes: Codes) -> tuple[int, int, int, int]:
    """The dtypes of STREAMS."""
    return (*codes, codes[2])


def item_sizes(codes: Codes) -> list[int]:
    return [DTYPES[code].itemsize for code in stream_codes(codes)]


def cases(seed: int, codes: Codes, count: int) -> Iterator[Case]:
    """Every size, aligned and not, with scalars on the device and in the launch, and a factor.

    `count` times there follow launches of one segment, of two and of forty, with rows of work for
    one or more blocks.
    """
    rng = np.random.default_rng([seed, *codes])
    for on_device in (True, False):
        yield make(
            rng, codes, [*SIZES, *SIZES], aligned=[True] * len(SIZES) + [False] * len(SIZES),
            work_rows=4096 if on_device else 7, on_device=on_device, factor=0.3,
        )  # fmt: skip
    for i in range(count):
        for n in (1, 2, 40):
            sizes = [int(size) for size in rng.choice(SIZES, size=n)]
            work_rows = (4096, 1, 3, 10)[i % 4]
            factor = None if n < 40 else float(rng.choice([0.1, 1.0, math.nan]))
            on_device = bool(i // 2 % 2)
            yield make(rng, codes, sizes, work_rows=work_rows, on_device=on_device, factor=factor)


def make(
    rng: np.random.Generator,
    codes: Codes,
    sizes: Sequence[int],
    *,
    aligned: Sequence[bool] | None = None,
    work_rows: int = 4096,
    on_device: bool = False,
    scalars: list[StepScalars] | None = None,
    factor: float | None = None,
) -> Case:
    """A case of segments of these sizes; what is not given is random."""
    units = [16 // size for size in item_sizes(codes)]
    if aligned is None:
        aligned = [bool(rng.random() < 0.5) for _ in sizes]
    offsets, segments = [], []
    for size, is_aligned in zip(sizes, aligned, strict=True):
        offset = [0] * 4
        if not is_aligned:
            offset = [int(rng.integers(n)) if rng.random() < 0.6 else 0 for n in units]
            if not any(offset):
                offset[rng.integers(4)] = 1
        offsets.append(tuple(offset))
        wild = rng.random() < 0.4
        segments.append(
            [_bits(rng, size, c, wild, name == "exp_avg_sq")
             for c, name in zip(stream_codes(codes), STREAMS, strict=True)]
        )  # fmt: skip
    if scalars is None:
        scalars = _some_scalars(rng, min(len(sizes) + 2, 48 if on_device else 32))
    rows = [int(row) for row in rng.integers(len(scalars), size=len(sizes))]
    return Case(codes, offsets, segments, scalars, rows, work_rows, on_device, factor)


def options(rng: np.random.Generator) -> dict[str, Any]:
    """Arguments of `schedule.step_scalars`, all but the step."""

    def choose(*values: Any) -> Any:
        return values[rng.integers(len(values))]

    return dict(
        lr=choose(1e-3, 0.1, 2.5, 1e-30),
        beta1=choose(0.9, 0.0, 0.5),
        beta2=choose(0.999, 0.99, 0.9, 0.0),
        eps=choose(1e-8, 1e-3, 0.0),
        weight_decay=choose(0.0, 0.1, 0.01),
        decoupled_weight_decay=choose(False, True),
        maximize=choose(False, True),
        degenerated_to_sgd=choose(True, True, False),
        rectification=choose("first_order", "exact"),
        rho_threshold=choose(5.0, 4.0),
        grad_scale=choose(1.0, 1.0, 1 / 1024, 3e-5, 1e30),
    )


def _some_scalars(rng: np.random.Generator, count: int) -> list[StepScalars]:
    """Rows of every action, from both sides of the threshold; some are unusual numbers."""
    extremes = [0.0, -0.0, 1.0, -1.0, 1e-45, 1e-39, 1e-310, 1.2e-38, 3e38, 1e39, math.inf, math.nan]
    rows = []
    for _ in range(count):
        kind = rng.integers(12)
        if kind == 0:
            rows.append(StepScalars(*[0.0] * 9))  # Action.SKIP
        elif kind == 1:
            numbers = [extremes[i] for i in rng.integers(len(extremes), size=8)]
            row = StepScalars(*numbers, action=float(rng.integers(1, 4)))
            if row.action == Action.HOLD:
                row = row._replace(decay=1.0)  # as step_scalars() promises
            rows.append(row)
        else:
            t = (1, 2, 4, 5, 6, 7, 9, 1000, 10**6)[rng.integers(9)]
            rows.append(schedule.step_scalars(t, **options(rng)))
    return rows


def _bits(rng: np.random.Generator, size: int, code: int, wild: bool, square: bool) -> np.ndarray:
    """Elements as bits: any bits at all if `wild`, or else ordinary numbers and a few special."""
    dtype, item = DTYPES[code], DTYPES[code].itemsize
    uint = UINTS[item]
    if wild:
        bits = rng.integers(0, 1 << 8 * item, size, dtype=np.uint64).astype(uint)
    else:
        x = rng.standard_normal(size) * 2.0 ** rng.integers(-20, 8, size)
        info = torch.finfo(dtype)
        special = [
            math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, info.max, info.smallest_normal,
            info.smallest_normal * info.eps, -info.smallest_normal * (1 - info.eps),
        ]  # fmt: skip
        where = rng.random(size) < 0.06
        x[where] = rng.choice(special, size=int(where.sum()))
        bits = torch.from_numpy(x).to(dtype).view(INTS[item]).numpy().view(uint)
    if square:
        clear = rng.random(size) < 0.97  # a few stay negative
        bits = np.where(clear, bits & uint((1 << 8 * item - 1) - 1), bits)
    return bits


def tensor(bits: np.ndarray, code: int) -> Tensor:
    return torch.from_numpy(bits.view(f"i{bits.itemsize}").copy()).view(DTYPES[code])


def plain(bits: np.ndarray, code: int) -> np.ndarray:
    """The bits, with one pattern for all NaNs."""
    t = tensor(bits, code)
    return torch.where(t.isnan(), torch.nan, t).view(INTS[bits.itemsize]).numpy()


def by_reference(case: Case) -> list[Streams]:
    """The segments after a step of the reference backend."""
    compute = torch.float64 if DTYPES[case.codes[0]] == torch.float64 else torch.float32
    scalars, results = case.effective, []
    for streams, row in zip(case.segments, case.rows, strict=True):
        tensors = list(map(tensor, streams, stream_codes(case.codes)))
        reference.radam_update_(*tensors, scalars[row], compute)
        results.append([t.view(INTS[t.element_size()]).numpy() for t in tensors])
    return results


def by_cpu(case: Case) -> list[Streams]:
    """The segments after a step of the CPU kernel."""
    results = [[bits.copy() for bits in streams] for streams in case.segments]
    addresses = [[bits.ctypes.data for bits in streams] for streams in results]
    rows, grads = tables(addresses, case.sizes, case.rows)
    scalars = np.array(case.effective, np.float64)
    cpu.step(
        rows.ctypes.data, grads.ctypes.data, len(grads), *case.codes, scalars.ctypes.data,
        len(scalars), 1,
    )  # fmt: skip
    return results


def tables(
    addresses: Sequence[Sequence[int]], sizes: Sequence[int], rows: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """The rows of segments and the column of gradients' addresses, as csrc/core/segment.h says."""
    segments = [
        dict(zip(STREAMS, at, strict=True), numel=size, scalars=row)
        for at, size, row in zip(addresses, sizes, rows, strict=True)
    ]
    table = [[segment[name] for name in cpu.segment_fields] for segment in segments]
    grads = [segment["grad"] for segment in segments]
    return np.array(table, np.uint64), np.array(grads, np.uint64)
