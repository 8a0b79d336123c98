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
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from radam_kernels.backends import cuda
from radam_kernels.modules import DTYPES, cpu
from radam_kernels.scaling import Scaling

GUARD = 777.0
NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Linux's number; named since Python 3.13
DEVICE = torch.device("cpu", 0)


@cache
def load(library: str) -> tuple[ModuleType, ctypes.CDLL]:
    """The emulated module, made by csrc/bind_cuda.cpp, and its C interface."""
    # pybind11 knows modules by their names, so every library has one of its own.
    name = f"{Path(library).parent.name}._cuda"
    spec = importlib.util.spec_from_file_location(name, library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, ctypes.CDLL(library)


def place(values: Tensor, offset: int) -> tuple[Tensor, Tensor]:
    """A copy that starts `offset` elements behind 16 bytes, and the guards before it.

    Its memory ends where the sanitizer watches.
    """
    buffer = torch.full((offset + values.numel(),), GUARD, dtype=values.dtype)
    assert buffer.numel() == 0 or buffer.data_ptr() % 16 == 0
    inside = buffer[offset:]
    inside.copy_(values)
    return inside, buffer[:offset]


def step(library: str, streams, sizes, offsets, steps, groups, of_group, scaling):
    """One step of segments, as test_cuda_emulated.py describes them.

    Args:
        streams: param, grad, exp_avg and exp_avg_sq of all segments, end to end.
        sizes, offsets, steps, of_group: of each segment; steps are tensors where capturable.
        groups: hyperparameters.
        scaling: for capturable segments.

    Returns: the streams and steps afterwards, and for each segment whether what lies before its
        tensors is as it was.
    """
    module, _ = load(library)
    table, parts, guards = cpu.Table(), [], []
    for values, at, step, group in zip(
        zip(*(stream.split(sizes) for stream in streams), strict=True),
        offsets,
        steps,
        of_group,
        strict=True,
    ):
        placed = [place(*pair) for pair in zip(values, at, strict=True)]
        parts.append([inside for inside, _ in placed])
        guards.append([guard for _, guard in placed])
        table.add(*parts[-1], step, group, parts[-1][0], isinstance(step, Tensor))
    for bucket in table.prepare(groups):
        cuda.launch_(module, bucket, table, groups, scaling.on(DEVICE), DEVICE, 0)
    table.advance()
    whole = [all(bool((g == GUARD).all()) for g in four if len(g)) for four in guards]
    return [torch.cat(stream) for stream in zip(*parts, strict=True)], steps, whole


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
        table = cpu.Table()
        table.add(*streams, 8.0, 0, streams[0])
        [bucket] = table.prepare([group])
        c.run_only_blocks(block, block + 1)
        try:
            cuda.launch_(module, bucket, table, [group], Scaling(), DEVICE, 0)
        finally:
            c.run_only_blocks(0, -1)
        results.append((block * chunk, old, [part.clone() for part in parts]))
    return results, resident() - before


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
