"""What a launch is given: segments of many sizes and alignments, with scalars of every action."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from radam_kernels import formats, schedule
from radam_kernels.backends import reference
from radam_kernels.modules import DTYPES, FORMAT_NAMES, cpu
from radam_kernels.schedule import Action, StepScalars
from tests.helpers import LOW_MEMORY_SETS

from .compilers import Codes

SIZES = (0, 1, 3, 4, 5, 255, 256, 257, 4095, 4096, 4097, 8192, 8193, 20000)
STREAMS = ("param", "grad", "exp_avg", "exp_avg_sq")
EXPONENTS = ("exp_avg_exponent", "exp_avg_sq_exponent")
INTS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
F64 = DTYPES.index(torch.float64)
UINTS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}

Streams = dict[str, np.ndarray]  # of one segment: their bits, by the names of dtypes_of()


@dataclass
class Case:
    """One launch."""

    codes: Codes
    offsets: list[dict[str, int]]  # in elements, of where each stream starts behind 16 bytes
    segments: list[Streams]
    scalars: list[StepScalars]
    rows: list[int]  # the row of scalars that each segment obeys
    work_rows: int = 4096  # the most rows of work
    on_device: bool = False  # whether the scalars are there, or are arguments of the launch
    factor: float | None = None  # on the device: multiplies the gradients
    first_indices: list[int] | None = None  # of segments in formats for low memory
    keys: list[int] | None = None  # likewise

    @property
    def sizes(self) -> list[int]:
        return [len(streams["param"]) for streams in self.segments]

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


def dtypes_of(codes: Codes) -> dict[str, torch.dtype]:
    """The dtypes of the tensors that a segment consists of."""
    param, grad, state = (FORMAT_NAMES[code] for code in codes)
    moment = torch.uint8 if state == "block8" else _tensor_dtype(state)
    four = _tensor_dtype(param), _tensor_dtype(grad), moment, moment
    found = dict(zip(STREAMS, four, strict=True))
    if param in ("master24", "master32"):
        found["remainder"] = formats.REMAINDERS[int(param[-2:])]
    if state == "block8":
        found |= dict.fromkeys(EXPONENTS, torch.uint8)
    return found


def _tensor_dtype(format: str) -> torch.dtype:
    return torch.bfloat16 if format.startswith(("bfloat16", "master")) else getattr(torch, format)


def count_of(name: str, size: int) -> int:
    """Elements of a stream of a segment."""
    return formats.blocks(size) if name in EXPONENTS else size


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
    dtypes = dtypes_of(codes)
    units = {name: 16 // dtype.itemsize for name, dtype in dtypes.items()}
    if aligned is None:
        aligned = [bool(rng.random() < 0.5) for _ in sizes]
    offsets, segments = [], []
    for size, is_aligned in zip(sizes, aligned, strict=True):
        offset = dict.fromkeys(dtypes, 0)
        if not is_aligned:
            offset = {
                name: int(rng.integers(n)) if rng.random() < 0.6 else 0 for name, n in units.items()
            }
            if not any(offset.values()):
                offset[STREAMS[rng.integers(4)]] = 1
        offsets.append(offset)
        wild = rng.random() < 0.4
        segments.append(
            {name: _bits(rng, count_of(name, size), dtype, wild, name)
             for name, dtype in dtypes.items()}
        )  # fmt: skip
    if scalars is None:
        scalars = _some_scalars(rng, min(len(sizes) + 2, 48 if on_device else 32))
    rows = [int(row) for row in rng.integers(len(scalars), size=len(sizes))]
    case = Case(codes, offsets, segments, scalars, rows, work_rows, on_device, factor)
    if codes in LOW_MEMORY_SETS:
        case.first_indices = [_first_index(rng, size) for size in sizes]
        case.keys = [int(key) for key in rng.integers(1 << 64, size=len(sizes), dtype=np.uint64)]
    return case


def _first_index(rng: np.random.Generator, size: int) -> int:
    """An index whose upper half is 0, or not, or becomes another in the segment."""
    kind = rng.integers(4)
    if kind < 2:
        return int(rng.integers(1 << (20 if kind == 0 else 44)))
    upper = int(rng.integers(1, 4)) << 32
    return upper - int(rng.integers(size + 1)) if kind == 2 else upper


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
        seed=choose(0, 1, 2**32 - 1),
    )


def _some_scalars(rng: np.random.Generator, count: int) -> list[StepScalars]:
    """Rows of every action, from both sides of the threshold; some are unusual numbers."""
    extremes = [0.0, -0.0, 1.0, -1.0, 1e-45, 1e-39, 1e-310, 1.2e-38, 3e38, 1e39, math.inf, math.nan]
    rows = []
    for _ in range(count):
        kind = rng.integers(12)
        if kind == 0:
            rows.append(StepScalars(*[0.0] * len(StepScalars._fields)))  # Action.SKIP
        elif kind == 1:
            numbers = [extremes[i] for i in rng.integers(len(extremes), size=8)]
            key = [float(word) for word in rng.integers(1 << 32, size=2)]
            row = StepScalars(*numbers, float(rng.integers(1, 4)), *key)
            if row.action == Action.HOLD:
                row = row._replace(decay=1.0)  # as step_scalars() promises
            rows.append(row)
        else:
            t = (1, 2, 4, 5, 6, 7, 9, 1000, 10**6)[rng.integers(9)]
            rows.append(schedule.step_scalars(t, **options(rng)))
    return rows


def _bits(
    rng: np.random.Generator, size: int, dtype: torch.dtype, wild: bool, name: str
) -> np.ndarray:
    """Elements as bits: any bits at all if `wild`, or else ordinary numbers and a few special."""
    item = dtype.itemsize
    uint = UINTS[item]
    if name in EXPONENTS:
        # No kernel writes a lower one, and none need read it. Ordinary ones make numbers that are
        # neither tiny nor huge, with a few blocks that are NaN.
        least = {"exp_avg_exponent": 16, "exp_avg_sq_exponent": 32}[name]
        bits = rng.integers(*((least, 256) if wild else (100, 140)), size).astype(uint)
        bits[rng.random(size) < 0.02] = 255
        return bits
    if wild or not dtype.is_floating_point:
        bits = rng.integers(0, 1 << 8 * item, size, dtype=np.uint64).astype(uint)
        if dtype == torch.uint8 and name in STREAMS:
            bits[rng.random(size) < 0.2] = 0
        if name == "remainder" and not wild:
            bits[rng.random(size) < 0.2] = 0
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
    if name == "exp_avg_sq" and dtype.is_floating_point:
        clear = rng.random(size) < 0.97  # a few stay negative
        bits = np.where(clear, bits & uint((1 << 8 * item - 1) - 1), bits)
    return bits


def tensor(bits: np.ndarray, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(bits.view(f"i{bits.itemsize}").copy()).view(dtype)


def plain(segment: Streams, dtypes: dict[str, torch.dtype]) -> Streams:
    """A segment's bits, with one pattern for all NaNs; those of block8 may have either sign."""
    found = dict(segment)
    for name, bits in segment.items():
        if dtypes[name].is_floating_point:
            t = tensor(bits, dtypes[name])
            found[name] = torch.where(t.isnan(), torch.nan, t).view(INTS[bits.itemsize]).numpy()
    if "exp_avg_exponent" in segment:
        nan = segment["exp_avg_exponent"].repeat(formats.BLOCK)[: len(segment["exp_avg"])] == 255
        found["exp_avg"] = np.where(nan, segment["exp_avg"] & 0x7F, segment["exp_avg"])
    return found


def by_reference(case: Case) -> list[Streams]:
    """The segments after a step of the reference backend."""
    compute = torch.float64 if case.codes[0] == F64 else torch.float32
    scalars, dtypes, results = case.effective, dtypes_of(case.codes), []
    for i, (streams, row) in enumerate(zip(case.segments, case.rows, strict=True)):
        tensors = {name: tensor(bits, dtypes[name]) for name, bits in streams.items()}
        four = [tensors[name] for name in STREAMS]
        if case.keys is None:
            reference.radam_update_(*four, scalars[row], compute)
        else:
            extra = [tensors.get(name) for name in ("remainder", *EXPONENTS)]
            low_memory = formats.LowMemory(*extra, case.first_indices[i], case.keys[i])
            reference.low_memory_update_(*four, low_memory, scalars[row], case.codes)
        results.append(
            {name: t.view(INTS[t.itemsize]).numpy().view(UINTS[t.itemsize])
             for name, t in tensors.items()}
        )  # fmt: skip
    return results


def by_cpu(case: Case) -> list[Streams]:
    """The segments after a step of the CPU kernel."""
    results = [{name: bits.copy() for name, bits in segment.items()} for segment in case.segments]
    addresses = [{name: bits.ctypes.data for name, bits in segment.items()} for segment in results]
    rows, grads, low_memory = tables(addresses, case.sizes, case.rows, case)
    scalars = np.array(case.effective, np.float64)
    cpu.step(
        rows.ctypes.data, grads.ctypes.data, len(grads), *case.codes, scalars.ctypes.data,
        len(scalars), 1, low_memory=0 if low_memory is None else low_memory.ctypes.data,
    )  # fmt: skip
    return results


def tables(
    addresses: Sequence[dict[str, int]], sizes: Sequence[int], rows: Sequence[int], case: Case
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """The tables of csrc/core/segment.h: segments, addresses of gradients, and LowMemory or None.

    Args:
        addresses: of the streams of each segment.
    """
    segments = [
        {**at, "numel": size, "scalars": row}
        for at, size, row in zip(addresses, sizes, rows, strict=True)
    ]
    table = [[segment[name] for name in cpu.segment_fields] for segment in segments]
    grads, low_memory = [segment["grad"] for segment in segments], None
    if case.keys is not None:
        extra = [
            {**at, "first_index": first, "key": key}
            for at, first, key in zip(addresses, case.first_indices, case.keys, strict=True)
        ]
        rows_ = [[one.get(name, 0) for name in cpu.low_memory_fields] for one in extra]
        low_memory = np.array(rows_, np.uint64)
    return np.array(table, np.uint64), np.array(grads, np.uint64), low_memory
