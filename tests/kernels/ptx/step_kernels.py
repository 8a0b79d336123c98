"""The step kernels, executed: their bits, and that they touch what they should and nothing else."""

import itertools
import math
import struct
from unittest.mock import patch

import numpy as np

from radam_kernels import schedule
from radam_kernels.backends import upload
from radam_kernels.modules import DTYPES
from radam_kernels.schedule import Action

from .arithmetic import Fault
from .cases import STREAMS, Case, Streams, by_cpu, by_reference, item_sizes, make, plain, tables
from .cases import cases as cases_of
from .compilers import Codes, Compiled
from .machine import Machine, launch
from .memory import Memory

# Row of csrc/cuda/step_cuda.cu: the scalars and the action.
ROWS = {4: struct.Struct("<8fi"), 8: struct.Struct("<8di4x")}


class StepKernel:
    """A compiled step kernel, which executes cases and counts them.

    Args:
        factor: whether it takes a factor on the device; Triton compiles a kernel for each answer.
    """

    def __init__(self, compiled: Compiled, codes: Codes, backend: str, factor: bool) -> None:
        self.program, self.codes, self.shared = compiled.program(), codes, compiled.shared
        self.triton, self.factor = backend == "triton", factor
        # How many elements a block steps, and how many a vector has: 16 bytes of the widest stream.
        if self.triton:
            from radam_kernels.backends.triton_kernel import CHUNK

            self.chunk = self.unit = CHUNK
        else:
            self.unit = 16 // max(item_sizes(codes))
            self.chunk = 1024 * self.unit
        self.elements = self.launches = 0

    def check(self, seed: int, count: int) -> list[str]:
        """What is wrong, in words; raises Fault where the kernel does what it must not."""
        wrong = []
        for case in cases_of(seed, self.codes, count):
            case.on_device |= self.triton
            if not self.factor:
                case.factor = None
            elif self.triton:
                case.factor = case.factor or 0.3
            wrong += self.compare(case)
        return wrong + self.compare_far()

    def compare(self, case: Case) -> list[str]:
        """Executes a case, and compares the bits with the reference and with the CPU kernel."""
        ours, wrong = self.execute(case), []
        for name, others in (("reference", by_reference(case)), ("cpu", by_cpu(case))):
            for i, j in itertools.product(range(len(ours)), range(4)):
                code = self.codes[min(j, 2)]
                a, b = plain(ours[i][j], code), plain(others[i][j], code)
                if (bad := np.flatnonzero(a != b)).size:
                    k = bad[0]
                    before = [hex(int(bits[k])) for bits in case.segments[i]]
                    wrong.append(
                        f"{STREAMS[j]}[{k}] of segment {i} (and {len(bad) - 1} more): {a[k]:#x}, "
                        f"not {b[k]:#x} as the {name} has; before: {before}, "
                        f"{case.effective[case.rows[i]]}"
                    )
        return wrong

    def execute(self, case: Case) -> list[Streams]:
        """The segments afterwards."""
        blocks, run, work = self._plan(case.sizes, case.work_rows)
        room = sum(bits.nbytes + 512 for streams in case.segments for bits in streams)
        room += 72 * len(case.scalars) + 48 * len(case.segments) + work.nbytes
        memory = Memory(room + 8192)
        items = item_sizes(self.codes)
        places = [
            [
                memory.put(bits, f"{name} of segment {i}", name != "grad", offset * item)
                for bits, offset, item, name in zip(streams, offsets, items, STREAMS, strict=True)
            ]
            for i, (streams, offsets) in enumerate(zip(case.segments, case.offsets, strict=True))
        ]
        before = self._bytes_loaded_by_16()
        params = self._params(memory, tables(places, case.sizes, case.rows), work, run, case)
        launch(self.program, memory, params, blocks, self.shared)
        self._count(case)
        loaded, wanted = self._bytes_loaded_by_16() - before, self._should_be_loaded_by_16(case)
        if loaded != wanted:
            raise Fault(f"{loaded} bytes came by loads of 16, not {wanted}")
        if not memory.guards_intact():
            raise Fault("a guard byte has changed")
        for i, j in itertools.product(range(len(places)), range(4)):
            action = case.action(i)
            held = self.triton and STREAMS[j] == "param" and action == Action.HOLD
            all_of_it = action != Action.SKIP and STREAMS[j] != "grad" and not held
            done = memory.written(places[i][j], case.segments[i][j].nbytes)
            if not (done.all() if all_of_it else not done.any()):
                raise Fault(
                    f"{STREAMS[j]} of segment {i} is not written exactly where it should be"
                )
        return [
            [memory.get(at, bits.dtype, len(bits)) for at, bits in zip(*segment, strict=True)]
            for segment in zip(places, case.segments, strict=True)
        ]

    def compare_far(self) -> list[str]:
        """Blocks around elements 2^31 and 2^32 of a segment, whose other memory is not there."""
        rng, numel, wrong = np.random.default_rng(5), 2**32 + 5, []
        scalars = [schedule.step_scalars(8, lr=0.01, beta1=0.9, beta2=0.99, eps=1e-8)]
        blocks, run, work = self._plan([numel])
        for block in (0, 2**31 // self.chunk - 1, 2**31 // self.chunk, blocks - 2, blocks - 1):
            begin = block * self.chunk
            size = min(self.chunk, numel - begin)
            factor = 0.3 if self.factor else None
            case = make(
                rng, self.codes, [size], aligned=[True], scalars=scalars, on_device=True,
                factor=factor,
            )  # fmt: skip
            memory = Memory(4 * (8 * self.chunk + 512) + work.nbytes + 8192)
            [streams] = case.segments
            places = [
                memory.put(bits, name, name != "grad")
                for bits, name in zip(streams, STREAMS, strict=True)
            ]
            starts = [
                (at - begin * bits.itemsize) % 2**64
                for at, bits in zip(places, streams, strict=True)
            ]
            params = self._params(memory, tables([starts], [numel], [0]), work, run, case)
            memory.begin_launch()
            Machine(self.program, memory, params, 1, self.shared, block, blocks).run()
            self._count(case)
            [truth] = by_reference(case)
            for j, (at, bits) in enumerate(zip(places, truth, strict=True)):
                code, ours = self.codes[min(j, 2)], memory.get(at, streams[j].dtype, size)
                if (plain(ours, code) != plain(bits, code)).any():
                    wrong.append(f"{STREAMS[j]} from element {begin}: other bits")
        return wrong

    def _plan(self, sizes: list[int], work_rows: int = 4096) -> tuple[int, int, np.ndarray]:
        with patch.object(upload, "_MAX_WORK_ROWS", work_rows):
            return upload.plan(np.array(sizes, np.int64), self.chunk)

    def _params(
        self,
        memory: Memory,
        table: tuple[np.ndarray, np.ndarray],
        work: np.ndarray,
        run: int,
        case: Case,
    ) -> bytes:
        """The parameters of the launch; puts what they point to into the memory."""
        segments, grads = map(memory.put, table, ("segments", "grads"))
        at_work, at_scalars = memory.put(work, "work"), 0
        scalars = np.array(case.scalars, np.float64)
        if case.on_device:
            at_scalars = memory.put(scalars, "scalars")
        at_factor = 0 if case.factor is None else memory.put(np.array(case.factor), "factor")
        if self.triton:
            factor = [at_factor] if self.factor else []
            return self.program.pack(segments, grads, at_work, at_scalars, *factor, run)
        item = 8 if DTYPES[self.codes[0]].itemsize == 8 else 4
        row, inline = ROWS[item], b""
        if not case.on_device:
            narrow = scalars.astype(f"f{item}")
            inline = b"".join(row.pack(*numbers[:8], int(numbers[8])) for numbers in narrow)
        arguments = struct.pack("<QQQi4xQQ", segments, grads, at_work, run, at_scalars, at_factor)
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
        items, total = item_sizes(self.codes), 0
        wide = sum(item for item in items if self.unit * item % 16 == 0)
        for i, (size, offsets) in enumerate(zip(case.sizes, case.offsets, strict=True)):
            aligned = not any(o * item % 16 for o, item in zip(offsets, items, strict=True))
            if aligned and case.action(i) != Action.SKIP:
                total += (size - size % self.unit) * wide
        return total
