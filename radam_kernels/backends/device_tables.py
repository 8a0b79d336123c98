"""The tables that GPU kernels read: segments, and which block steps what; uploaded on change."""

import ctypes
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..flat import SEGMENT_FIELDS
from ..schedule import StepScalars


@dataclass
class DeviceTables:
    """What a launch reads on the device. Never overwritten: a change makes new ones."""

    segments: Tensor  # int64 [segments, 6], rows of SEGMENT_FIELDS
    work: Tensor  # int32 [blocks, 2]: segment, chunk
    host_segments: bytes
    numels: bytes
    chunk: int


def device_tables(bucket, table, chunk: int, device: torch.device, stream: int) -> DeviceTables:
    """The tables of a bucket, from the last step where nothing has changed.

    A launch that is still queued keeps reading its own tables: their memory goes back to torch's
    allocator, which hands it out again in stream order only, and the pinned memory of a copy when
    that copy is done.

    Args:
        chunk: elements that a block steps.
        stream: of the launch; tables are not shared between streams.
    """
    key = (bucket.device, bucket.dtypes, stream)
    cache = table.__dict__.setdefault("device_tables", {})
    rows = _view(bucket.table[0], bucket.count, ctypes.c_int64, len(SEGMENT_FIELDS))
    host_segments, numels = rows.tobytes(), rows[:, SEGMENT_FIELDS.index("numel")].tobytes()
    old = cache.get(key)
    if old and old.host_segments == host_segments and old.chunk == chunk:
        return old
    same_work = old and old.numels == numels and old.chunk == chunk
    work = old.work if same_work else upload(_work(rows, chunk), device)
    new = DeviceTables(upload(rows.copy(), device), work, host_segments, numels, chunk)
    cache[key] = new
    return new


def upload(rows: np.ndarray, device: torch.device) -> Tensor:
    """A copy on the device, in order with the current stream; the host does not wait for it."""
    host = torch.from_numpy(rows)
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


def scalars_rows(address: int, count: int) -> np.ndarray:
    """A copy of the StepScalars at an address: float64 [count, 9]."""
    return _view(address, count, ctypes.c_double, len(StepScalars._fields)).copy()


def refuse_capture() -> None:
    """Raises RuntimeError while a CUDA graph is being captured: replays would not count steps."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "radam_kernels.RAdam.step can't be captured in a CUDA graph: it counts steps on the "
            "host; leave it out of the graph, or use torch.optim.RAdam(capturable=True)"
        )


def _work(rows: np.ndarray, chunk: int) -> np.ndarray:
    """Which chunk of which segment each block steps: int32 [blocks, 2]."""
    blocks = -(-rows[:, SEGMENT_FIELDS.index("numel")] // chunk)
    segment = np.repeat(np.arange(len(rows)), blocks)
    first = np.repeat(np.cumsum(blocks) - blocks, blocks)
    return np.stack([segment, np.arange(len(segment)) - first], axis=1).astype(np.int32)


def _view(address: int, rows: int, kind: type, columns: int) -> np.ndarray:
    return np.ctypeslib.as_array((kind * (rows * columns)).from_address(address)).reshape(
        -1, columns
    )
