"""The kernels of the norm, executed: their results, and that they touch what they should."""

import math
import struct
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from radam_kernels.backends import upload
from radam_kernels.modules import DTYPES
from tests.kernels import norms

from .arithmetic import Fault
from .cases import INTS
from .compilers import Compiled
from .machine import Machine, launch
from .memory import Memory


def cuda_params(
    grads: int = 0, work: int = 0, run: int = 0, blocks: int = 0, partials: int = 0, result: int = 0
) -> bytes:
    """CudaPowerSum of csrc/cuda/norm_cuda.h; the kernels ignore dtype, norm, device and stream."""
    return struct.pack("<iiQQi4xqqQi4xQ", 0, 0, grads, work, run, blocks, partials, result, 0, 0)


class NormKernels:
    """The kernel of the partial sums and that of the total, for one dtype and norm."""

    def __init__(
        self, compiled: tuple[Compiled, Compiled], dtype: int, norm_type: float, backend: str
    ) -> None:
        self.dtype, self.norm_type, self.triton = DTYPES[dtype], norm_type, backend == "triton"
        self.partial, self.total = (one.program() for one in compiled)
        self.shared = [one.shared for one in compiled]
        if self.triton:
            from radam_kernels.backends.triton_kernel import norm_chunk

            self.chunk, self.error = norm_chunk(dtype), norms.TRITON_ERROR
        else:
            self.chunk, self.error = 1024 * (16 // self.dtype.itemsize), norms.CUDA_ERROR
        self.elements = self.launches = 0

    def check(self) -> list[str]:
        """What is wrong, in words; raises Fault where a kernel does what it must not."""
        wrong = []
        for i, (name, tensors) in enumerate(norms.cases(self.dtype, self.chunk)):
            offset = (i % 2) * (i % (16 // self.dtype.itemsize))
            result = self.execute(tensors, offset, (4096, 1, 3)[i % 3])
            try:
                norms.assert_close(result, tensors, self.norm_type, self.error)
            except AssertionError as error:
                wrong.append(f"{name}: {error}")
        return wrong + self.check_far() + self.check_total()

    def check_far(self) -> list[str]:
        """The last block of a gradient of more than 2^32 elements, of which only its own exist."""
        numel = 2**32 + 5
        blocks, run, work = upload.plan(np.array([numel]), self.chunk)
        begin = (blocks - 1) * self.chunk
        values = torch.full((numel - begin,), 2.0, dtype=self.dtype)
        memory = Memory(work.nbytes + 8192)
        at = memory.put(values.view(INTS[self.dtype.itemsize]).numpy(), "gradient")
        rows = np.array([at - begin * self.dtype.itemsize, numel])
        partial = memory.put(np.full(1, math.nan), "partial", True)
        params = self.params(
            memory.put(rows, "grads"), memory.put(work, "work"), run, blocks,
            partial - 8 * (blocks - 1),
        )  # fmt: skip
        memory.begin_launch()
        first, shared = blocks - 1, self.shared[0]
        Machine(self.partial, memory, params, 1, shared, first, blocks).run()
        self.launches += 1
        ours = float(memory.get(partial, np.dtype(np.float64), 1)[0])
        truth = norms.power_sum([values], self.norm_type)
        return [] if ours == truth else [f"from element {begin}: {ours!r}, not {truth!r}"]

    def check_total(self) -> list[str]:
        """Partial sums that the last kernel reads in one turn or in several."""
        wrong, rng = [], np.random.default_rng(0)
        for count in (0, 1, 1023, 1024, 1025, 20_000):
            numbers = np.abs(rng.standard_normal(count)) * 2.0 ** rng.integers(-300, 300, count)
            memory = Memory(numbers.nbytes + 8192)
            partials = memory.put(numbers, "partials")
            result = memory.put(np.full(1, math.nan), "result", True)
            ours = self.add_up(memory, partials, count, result)
            largest = self.norm_type == math.inf
            truth = float(numbers.max(initial=0)) if largest else math.fsum(numbers)
            if abs(ours - truth) > (0 if largest else norms.FLOAT64_ERROR * truth):
                wrong.append(f"the total of {count}: {ours!r}, not {truth!r}")
        return wrong

    def params(self, grads: int, work: int, run: int, blocks: int, partials: int) -> bytes:
        """The parameters of the first kernel."""
        if self.triton:
            return self.partial.pack(grads, work, partials, run)
        return cuda_params(grads, work, run, blocks, partials)

    def add_up(self, memory: Memory, partials: int, count: int, result: int) -> float:
        if self.triton:
            params = self.total.pack(partials, result, count)
        else:
            params = cuda_params(blocks=count, partials=partials, result=result)
        launch(self.total, memory, params, 1, self.shared[1])
        if not memory.guards_intact():
            raise Fault("a guard byte has changed")
        self.launches += 1
        return float(memory.get(result, np.dtype(np.float64), 1)[0])

    def execute(self, tensors: list[Tensor], offset: int, work_rows: int) -> float:
        """The power sum of gradients that start `offset` elements behind 16 bytes."""
        numels = np.array([len(t) for t in tensors], np.int64)
        with patch.object(upload, "_MAX_WORK_ROWS", work_rows):
            blocks, run, work = upload.plan(numels, self.chunk)
        item = self.dtype.itemsize
        memory = Memory(sum(t.nbytes + 512 for t in tensors) + work.nbytes + 8 * blocks + 65536)
        places = [
            memory.put(t.view(INTS[item]).numpy(), f"gradient {i}", skip=offset * item)
            for i, t in enumerate(tensors)
        ]
        rows = np.stack([np.array(places, np.int64), numels], 1)
        at_rows, at_work = memory.put(rows, "grads"), memory.put(work, "work")
        partials = memory.put(np.full(blocks, math.nan), "partials", True)
        result = memory.put(np.full(1, math.nan), "result", True)

        params = self.params(at_rows, at_work, run, blocks, partials)
        loaded = self._loaded_by_16()
        launch(self.partial, memory, params, blocks, self.shared[0])
        self.launches += 1
        self.elements += int(numels.sum())
        loaded = self._loaded_by_16() - loaded
        if not memory.written(partials, 8 * blocks).all():
            raise Fault("a partial sum is missing")
        whole = sum(int(n) // self.chunk for n in numels) * self.chunk * item
        wanted = 0 if offset else whole
        if loaded != wanted:
            raise Fault(f"{loaded} bytes came by loads of 16, not {wanted}")
        return self.add_up(memory, partials, blocks, result)

    def _loaded_by_16(self) -> int:
        """Bytes that the first kernel has loaded so."""
        return sum(
            16 * one.hits
            for one in self.partial.code
            if one.name == "ld"
            and one.access[2] in ("global", "generic")
            and math.prod(one.access[:2]) == 16
        )
