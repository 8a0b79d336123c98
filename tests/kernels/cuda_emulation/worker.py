"""Runs the emulated CUDA kernels in a process under AddressSanitizer, for test_cuda_emulated.py.

Reads pickled (function name, arguments) from stdin and answers each with a pickled result. An error
that a sanitizer finds ends the process, with its report on stderr.
"""

import ctypes
import importlib.util
import mmap
import os
import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from radam_kernels.backends import cuda
from radam_kernels.backends import upload as upload_tables
from radam_kernels.modules import DTYPES, cpu
from radam_kernels.scaling import UNSCALED, address
from radam_kernels.schedule import StepScalars
from tests.kernels.norms import Gradients


@dataclass
class LowMemorySegment:
    # param, grad, exp_avg, exp_avg_sq; remainder and both exponents, or None.
    streams: list[Tensor | None]
    offsets: tuple[int, ...]  # in elements, of where each starts behind 16 bytes
    first_index: int
    key: int
    row: int  # of scalars


Scalars = list[StepScalars]
GUARD = 77  # which every dtype has
NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Linux's number; named since Python 3.13
DEVICE = torch.device("cpu", 0)


@cache
def load(library: str) -> tuple[ModuleType, ctypes.CDLL]:
    """The emulated module, made by csrc/bind/bind_cuda.cpp, and its C interface."""
    # pybind11 knows modules by their names, so every library has one of its own.
    name = f"{Path(library).parent.name}._cuda"
    spec = importlib.util.spec_from_file_location(name, library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    c = ctypes.CDLL(library)
    c.take_launches.restype = c.take_uploaded.restype = ctypes.c_int64
    return module, c


def place(values: Tensor, offset: int) -> tuple[Tensor, Tensor]:
    """A copy that starts `offset` elements behind 16 bytes, and the guards before it.

    Its memory ends where the sanitizer watches.
    """
    buffer = torch.full((offset + values.numel(),), GUARD, dtype=values.dtype)
    assert buffer.numel() == 0 or buffer.data_ptr() % 16 == 0
    inside = buffer[offset:]
    inside.copy_(values)
    return inside, buffer[:offset]


def make_plan(tensors, steps, groups, of_group, scaling=UNSCALED):
    """A plan of one step of segments, group after group.

    Args:
        tensors: param, grad, exp_avg and exp_avg_sq of each segment, of any supported dtypes; for a
            format also the remainder and both exponents, or None.
        steps: of each segment, the count of this step, or a tensor that counts where capturable.
        groups: hyperparameters.
        of_group: of each segment.
    """
    stepped, listed = {}, []
    for index, group in enumerate(groups):
        members = [i for i, other in enumerate(of_group) if other == index]
        owners = [torch.empty(0) for _ in members]
        for i, owner in zip(members, owners, strict=True):
            owner.grad = torch.empty(0)  # torch allows only gradients of the parameter's dtype
            capturable = isinstance(steps[i], Tensor)
            count = steps[i] if capturable else torch.tensor(steps[i] - 1.0)
            param, grad, exp_avg, exp_avg_sq, *more = tensors[i]
            more = more or [None] * 3
            stepped[id(owner)] = (owner, param, grad, exp_avg, exp_avg_sq, count, *more)
            # That of float64 parameters follows from them.
            dtype = {torch.float64: None, torch.uint8: "block8"}.get(exp_avg.dtype, exp_avg.dtype)
            group = {**group, "capturable": capturable, "state_dtype": dtype}
        listed.append({**group, "params": owners})
    plan = cpu.Plan()
    pending = plan.refresh(listed, {}, stepped, scaling)
    assert not pending, pending
    return plan


def step(library: str, streams, sizes, offsets, steps, groups, of_group, scaling):
    """One step of segments, as test_cuda_emulated.py describes them.

    Args:
        streams: param, grad, exp_avg and exp_avg_sq of all segments, end to end.
        sizes, offsets, steps, of_group: of each segment; steps are tensors where capturable.
        groups: hyperparameters.
        scaling: for capturable segments.

    Returns: the streams and steps afterwards, and for each segment whether what lies before its
        tensors is unchanged.
    """
    module, _ = load(library)
    parts, guards = [], []
    split = zip(*(stream.split(sizes) for stream in streams), strict=True)
    for values, at in zip(split, offsets, strict=True):
        placed = [place(*pair) for pair in zip(values, at, strict=True)]
        parts.append([inside for inside, _ in placed])
        guards.append([guard for _, guard in placed])
    run(module, make_plan(parts, steps, groups, of_group, scaling))
    whole = [all(bool((g == GUARD).all()) for g in four if len(g)) for four in guards]
    return [torch.cat(stream) for stream in zip(*parts, strict=True)], steps, whole


def low_memory_step(
    library: str, codes: tuple[int, int, int], segments: list[LowMemorySegment], rows: Scalars
) -> list[tuple[list[Tensor | None], bool]]:
    """One step of segments in formats for low memory, with tables of any index and key.

    Returns: of each segment its streams afterwards, and whether what lies before them is unchanged.
    """
    module, _ = load(library)
    none = (None, torch.empty(0))
    placed = [
        [none if x is None else place(x, at) for x, at in zip(s.streams, s.offsets, strict=True)]
        for s in segments
    ]
    addresses = [[address(inside) for inside, _ in streams] for streams in placed]
    segment_rows, low_memory = [], []
    for s, (p, _, m, v, *more) in zip(segments, addresses, strict=True):
        segment_rows.append([p, m, v, len(s.streams[0]), s.row])
        low_memory.append([*more, s.first_index, s.key])
    scalars = np.array(rows)
    bucket = SimpleNamespace(
        cache=None,
        dtypes=codes,
        capturable=False,
        segment_rows=np.array(segment_rows, np.uint64).tobytes(),
        grad_rows=np.array([streams[1] for streams in addresses], np.uint64).tobytes(),
        low_memory_rows=np.array(low_memory, np.uint64).tobytes(),
        scalars=(scalars.ctypes.data, len(rows)),
        scalar_rows=scalars.tobytes(),
        scaling=UNSCALED,
    )
    cuda.launch_(module, bucket, DEVICE, 0)
    return [
        ([inside for inside, _ in streams], all(bool((g == GUARD).all()) for _, g in streams))
        for streams in placed
    ]


def run(module: ModuleType, plan) -> None:
    """A step by the emulated kernels, as launch() runs it."""
    plan.begin()
    for bucket in plan.buckets:
        cuda.launch_(module, bucket, DEVICE, 0)
    plan.commit()


def steps(library: str, params: list[Tensor], grads: list[list[Tensor]], group: dict):
    """Steps of an optimizer, whose gradients are new objects at each step.

    Args:
        grads: of each step; memory is the same where a step's are the very list of the step before.

    Returns: the parameters and their states afterwards, and of each step the launches and the
        bytes that were uploaded.
    """
    module, c = load(library)
    plan, state, seen = cpu.Plan(), {}, []
    for param in params:
        state[param] = {"step": torch.tensor(0.0)}
        state[param] |= {key: torch.zeros_like(param) for key in ("exp_avg", "exp_avg_sq")}
    c.take_launches(), c.take_uploaded()
    for some in grads:
        for param, grad in zip(params, some, strict=True):
            param.grad = grad.view_as(grad)
        pending = plan.refresh([{**group, "params": params}], state, {}, UNSCALED)
        assert not pending, pending
        run(module, plan)
        plan.release()
        seen.append((c.take_launches(), c.take_uploaded()))
    return [param.detach() for param in params], list(state.values()), seen


def far(library: str, codes: tuple[int, int, int], numel: int, blocks: list[int], group: dict):
    """One step each of some blocks of one sparse segment; most of its memory is never there.

    Returns: (first element, streams before, streams after) of each block, and by how many bytes
        this process has grown.
    """
    module, c = load(library)
    chunk = module.chunk(*codes)
    streams = []
    for code in (codes[0], codes[1], codes[2], codes[2]):
        size = numel * DTYPES[code].itemsize
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
        streams.append(torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=DTYPES[code]))
    generator = torch.Generator().manual_seed(0)
    results, before = [], resident()
    for block in blocks:
        parts = [stream[block * chunk : (block + 1) * chunk] for stream in streams]
        for part in parts:
            part.copy_(torch.rand(len(part), generator=generator, dtype=torch.float64))
        old = [part.clone() for part in parts]
        plan = cpu.Plan()
        pending = plan.refresh_tensors(*([stream] for stream in streams), 8.0, group, UNSCALED)
        assert not pending, pending
        [bucket] = plan.buckets
        c.run_only_blocks(block, block + 1)
        try:
            cuda.launch_(module, bucket, DEVICE, 0)
        finally:
            c.run_only_blocks(0, -1)
        results.append((block * chunk, old, [part.clone() for part in parts]))
    return results, resident() - before


def norm_chunk(library: str, dtype: int) -> int:
    return load(library)[0].norm_chunk(dtype)


def power_sums(
    library: str, tensors: list[Tensor], norm_types: list[float], offset: int, backwards: bool
) -> list[float]:
    """The power sum of gradients for each norm.

    Args:
        offset: in elements, of where each starts behind 16 bytes.
        backwards: whether the last block runs first.
    """
    module, c = load(library)
    gradients = Gradients([place(values, offset)[0] for values in tensors])
    bucket = gradients.bucket
    c.run_blocks_backwards(backwards)
    with new_memory_is_nan():
        found = [cuda.power_sum_(module, bucket, p, DEVICE, 0).item() for p in norm_types]
    c.run_blocks_backwards(False)
    return found


@contextmanager
def new_memory_is_nan() -> Iterator[None]:
    """Of torch.empty, so that it shows if it is read before it is written."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def norm_far(library: str, numel: int, block: int) -> tuple[Tensor, float]:
    """What one block of a sparse bfloat16 gradient holds, and the sum of its squares."""
    module, c = load(library)
    dtype = torch.bfloat16
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
    grad = torch.frombuffer(mmap.mmap(-1, numel * dtype.itemsize, flags=flags), dtype=dtype)
    chunk = module.norm_chunk(DTYPES.index(dtype))
    values = grad[block * chunk : (block + 1) * chunk]
    values.copy_(torch.rand(len(values), generator=torch.Generator().manual_seed(0)))
    blocks, run, work = upload_tables.plan(np.array([numel]), chunk)
    rows = np.array([[grad.data_ptr(), numel]])
    partials, result = np.zeros(blocks), np.zeros(1)
    c.run_only_blocks(block, block + 1)
    module.power_sum(
        rows.ctypes.data, work.ctypes.data, run, blocks, DTYPES.index(dtype), 2.0,
        partials.ctypes.data, result.ctypes.data, 0, 0,
    )  # fmt: skip
    c.run_only_blocks(0, -1)
    return values.clone(), float(result[0])


def norm_uploads(library: str, sizes: list[int]) -> list[tuple[int, int]]:
    """Launches and bytes uploaded: at first, again, and after one gradient has moved."""
    module, c = load(library)
    gradients, seen = Gradients([torch.ones(size) for size in sizes]), []
    c.take_launches(), c.take_uploaded()
    for moves in (False, False, True):
        if moves:
            gradients.tensors[-1] = gradients.tensors[-1].clone()
        total = cuda.power_sum_(module, gradients.bucket, 1.0, DEVICE, 0)
        assert total.item() == sum(sizes)
        seen.append((c.take_launches(), c.take_uploaded()))
    return seen


def norm_error(library: str, norm_type: float) -> str:
    try:
        gradients = Gradients([torch.ones(3)])
        cuda.power_sum_(load(library)[0], gradients.bucket, norm_type, DEVICE, 0)
    except ValueError as error:
        return str(error)
    return "no error"


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def on_device(library: str, device: int) -> tuple[int, int, str]:
    """Launches on a device: (device of the launch, current one after it, error)."""
    module, c = load(library)
    to, error = torch.zeros(1, dtype=torch.int64), ""
    try:
        module.upload(to.data_ptr(), bytes(8), device, 0)
    except RuntimeError as raised:
        error = str(raised)
    return c.device_of_last_launch(), c.current_device(), error


def upload(library: str, rows: bytes) -> bytes:
    """What arrives of an upload."""
    module, _ = load(library)
    to = torch.zeros(len(rows) // 8, dtype=torch.int64)
    module.upload(to.data_ptr(), rows, 0, 0)
    return to.numpy().tobytes()


def main() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever else is printed
    while True:
        try:
            name, arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(globals()[name](*arguments), answers)
        answers.flush()


if __name__ == "__main__":
    main()
