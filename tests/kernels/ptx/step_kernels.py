"""The step kernels, executed: their bits, and that they touch what they should and nothing else."""

import math
import struct
from collections.abc import Iterator
from dataclasses import replace
from unittest.mock import patch

import numpy as np

from radam_kernels import schedule
from radam_kernels.backends import upload
from radam_kernels.modules import FORMAT_NAMES
from radam_kernels.schedule import Action
from tests.helpers import LOW_MEMORY_SETS

from .arithmetic import Fault
from .cases import (
    EXPONENTS,
    F64,
    STREAMS,
    Case,
    Streams,
    by_cpu,
    by_reference,
    count_of,
    dtypes_of,
    make,
    plain,
    tables,
)  # fmt: skip
from .cases import cases as cases_of
from .compilers import Codes, Compiled
from .machine import Machine, launch
from .memory import Memory

# Row of csrc/cuda/step_kernel.h: the scalars, the action, and the key.
ROWS = {4: struct.Struct("<8fiII"), 8: struct.Struct("<8diII4x")}
UPPER = 1 << 32  # where the upper half of an index changes


class StepKernel:
    """A compiled step kernel, which executes cases and counts them.

    Args:
        factor: whether it takes a factor on the device; Triton compiles a kernel for each answer.
    """

    def __init__(self, compiled: Compiled, codes: Codes, backend: str, factor: bool) -> None:
        self.program, self.codes, self.shared = compiled.program(), codes, compiled.shared
        self.triton, self.factor = backend == "triton", factor
        self.low_memory, self.dtypes = codes in LOW_MEMORY_SETS, dtypes_of(codes)
        self.items = {name: dtype.itemsize for name, dtype in self.dtypes.items()}
        param, _, state = (FORMAT_NAMES[code] for code in codes)
        # Triton's kernels look at the upper half of the index whether they need it or not.
        self.random = self.triton or param != "master32" or state.endswith(("stochastic", "block8"))
        # How many elements a block steps, and a thread by one load of each stream; and of how many
        # those in a part are a multiple which is stepped so.
        if self.triton:
            from radam_kernels.backends.triton_kernel import CHUNK

            self.chunk = self.vector = self.unit = CHUNK
        else:
            self.chunk, self.vector, self.unit = cuda_sizes(codes, self.items)
        self.elements = self.launches = 0

    def held(self, action: float, name: str) -> bool:
        """Whether a stream is not stored, because the step only updates the moments."""
        kept = self.triton or self.low_memory
        return kept and action == Action.HOLD and name in ("param", "remainder")

    def wrong(self, seed: int, count: int) -> Iterator[str]:
        """What is wrong, in words; raises Fault where the kernel does what it must not."""
        for case in cases_of(seed, self.codes, count):
            case.on_device |= self.triton
            if not self.factor:
                case.factor = None
            elif self.triton:
                case.factor = case.factor or 0.3
            yield from self.compare(case)
        yield from self.compare_far()

    def compare(self, case: Case) -> Iterator[str]:
        """Executes a case, and compares the bits with the reference and with the CPU kernel."""
        ours = self.execute(case)
        for by, others in (("reference", by_reference(case)), ("cpu", by_cpu(case))):
            for i, pair in enumerate(zip(ours, others, strict=True)):
                a, b = (plain(segment, self.dtypes) for segment in pair)
                for name in a:
                    if (bad := np.flatnonzero(a[name] != b[name])).size:
                        yield self._difference(case, i, name, a[name], b[name], bad, by)

    def _difference(
        self, case: Case, i: int, name: str, a: np.ndarray, b: np.ndarray, bad: np.ndarray, by: str
    ) -> str:
        k = int(bad[0])
        before = [
            hex(int(bits[min(k, len(bits) - 1)]))
            for other, bits in case.segments[i].items()
            if (other in EXPONENTS) == (name in EXPONENTS)
        ]
        return (
            f"{name}[{k}] of segment {i} (and {len(bad) - 1} more): {a[k]:#x}, not {b[k]:#x} as "
            f"the {by} has; before: {before}, {case.effective[case.rows[i]]}"
        )

    def execute(self, case: Case) -> list[Streams]:
        """The segments afterwards."""
        blocks, run, work = self._plan(case.sizes, case.work_rows)
        room = sum(bits.nbytes + 512 for segment in case.segments for bits in segment.values())
        room += 88 * len(case.scalars) + 88 * len(case.segments) + work.nbytes
        memory = Memory(room + 8192)
        places = [
            {
                name: memory.put(
                    bits, f"{name} of segment {i}", name != "grad", offsets[name] * self.items[name]
                )
                for name, bits in segment.items()
            }
            for i, (segment, offsets) in enumerate(zip(case.segments, case.offsets, strict=True))
        ]
        before = self._bytes_loaded_by_16()
        params = self._params(memory, tables(places, case.sizes, case.rows, case), work, run, case)
        launch(self.program, memory, params, blocks, self.shared)
        self._count(case)
        loaded, wanted = self._bytes_loaded_by_16() - before, self._should_be_loaded_by_16(case)
        if loaded != wanted:
            raise Fault(f"{loaded} bytes came by loads of 16, not {wanted}")
        if not memory.guards_intact():
            raise Fault("a guard byte has changed")
        for i, segment in enumerate(case.segments):
            action = case.action(i)
            for name, bits in segment.items():
                stored = action != Action.SKIP and name != "grad" and not self.held(action, name)
                done = memory.written(places[i][name], bits.nbytes)
                if not (done.all() if stored else not done.any()):
                    raise Fault(f"{name} of segment {i} is not written exactly where it should be")
        return [
            {name: memory.get(at[name], bits.dtype, len(bits)) for name, bits in segment.items()}
            for at, segment in zip(places, case.segments, strict=True)
        ]

    def compare_far(self) -> Iterator[str]:
        """Blocks around elements 2^31 and 2^32 of a segment, whose other memory is not there."""
        rng, numel = np.random.default_rng(5), 2**32 + 5
        scalars = [schedule.step_scalars(8, lr=0.01, beta1=0.9, beta2=0.99, eps=1e-8, seed=1)]
        blocks, run, work = self._plan([numel])
        for block in (0, 2**31 // self.chunk - 1, 2**31 // self.chunk, blocks - 2, blocks - 1):
            begin = block * self.chunk
            size = min(self.chunk, numel - begin)
            factor = 0.3 if self.factor else None
            case = make(
                rng, self.codes, [size], aligned=[True], scalars=scalars, on_device=True,
                factor=factor,
            )  # fmt: skip
            memory = Memory(len(self.items) * (8 * self.chunk + 512) + work.nbytes + 8192)
            [segment] = case.segments
            places = {
                name: memory.put(bits, name, name != "grad") for name, bits in segment.items()
            }
            starts = {
                name: (at - count_of(name, begin) * self.items[name]) % 2**64
                for name, at in places.items()
            }
            table = tables([starts], [numel], [0], replace(case, first_indices=[3]))
            case.first_indices = [begin + 3]
            params = self._params(memory, table, work, run, case)
            memory.begin_launch()
            Machine(self.program, memory, params, 1, self.shared, block, blocks).run()
            self._count(case)
            ours = {
                name: memory.get(at, segment[name].dtype, len(segment[name]))
                for name, at in places.items()
            }
            a, b = (plain(bits, self.dtypes) for bits in (ours, *by_reference(case)))
            for name in a:
                if (a[name] != b[name]).any():
                    yield f"{name} from element {begin}: other bits"

    def _plan(self, sizes: list[int], work_rows: int = 4096) -> tuple[int, int, np.ndarray]:
        with patch.object(upload, "_MAX_WORK_ROWS", work_rows):
            return upload.plan(np.array(sizes, np.int64), self.chunk)

    def _params(
        self,
        memory: Memory,
        table: tuple[np.ndarray, np.ndarray, np.ndarray | None],
        work: np.ndarray,
        run: int,
        case: Case,
    ) -> bytes:
        """The parameters of the launch; puts what they point to into the memory."""
        segments, grads = map(memory.put, table[:2], ("segments", "grads"))
        low_memory = 0 if table[2] is None else memory.put(table[2], "low_memory")
        at_work, at_scalars = memory.put(work, "work"), 0
        scalars = np.array(case.scalars, np.float64)
        if case.on_device:
            at_scalars = memory.put(scalars, "scalars")
        at_factor = 0 if case.factor is None else memory.put(np.array(case.factor), "factor")
        if self.triton:
            extra = [low_memory] if self.low_memory else []
            factor = [at_factor] if self.factor else []
            return self.program.pack(segments, grads, *extra, at_work, at_scalars, *factor, run)
        item = 8 if self.codes[0] == F64 else 4
        row, inline = ROWS[item], b""
        if not case.on_device:
            rows = zip(scalars[:, :8].astype(f"f{item}"), scalars[:, 8:], strict=True)
            inline = b"".join(row.pack(*narrow, *map(int, exact)) for narrow, exact in rows)
        arguments = struct.pack(
            "<QQQQi4xQQ", segments, grads, low_memory, at_work, run, at_scalars, at_factor
        )
        return (arguments + inline).ljust(self.program.params_size, b"\0")

    def _count(self, case: Case) -> None:
        self.launches += 1
        self.elements += sum(case.sizes)

    def _bytes_loaded_by_16(self) -> int:
        loads = [one for one in self.program.code if one.name == "ld"]
        return sum(
            16 * one.hits
            for one in loads
            if one.access[2] in ("global", "generic") and math.prod(one.access[:2]) == 16
        )

    def _should_be_loaded_by_16(self, case: Case) -> int:
        streams = {name: item for name, item in self.items.items() if name not in EXPONENTS}
        wide = sum(item for item in streams.values() if self.vector * item % 16 == 0)
        total = 0
        for i, (size, offsets) in enumerate(zip(case.sizes, case.offsets, strict=True)):
            aligned = not any(
                offsets[name] * item % min(16, self.vector * item if name == "remainder" else 16)
                for name, item in streams.items()
            )
            if not aligned or case.action(i) == Action.SKIP:
                continue
            for begin in range(0, size, self.chunk):
                count = min(self.chunk, size - begin)
                if case.keys and self.random:
                    low = (case.first_indices[i] + begin) % UPPER
                    if low + count > UPPER:
                        continue
                total += (count - count % self.unit) * wide
        return total


def cuda_sizes(codes: Codes, items: dict[str, int]) -> tuple[int, int, int]:
    """Elements of a chunk, of a vector, and of a unit of vectors, as in csrc/cuda/step_kernel.h."""
    threads, vectors, warp = 256, 4, 32
    param, _, state = (FORMAT_NAMES[code] for code in codes)
    widest = max(items[name] for name in STREAMS)
    if state == "block8":
        return threads * 16, 16, warp * 16
    vector = 8 if param == "master24" else 16 // widest
    return threads * (vectors * 16 // widest), vector, vector
