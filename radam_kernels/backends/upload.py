"""The tables that GPU kernels read, uploaded again only where their rows have changed."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..modules import cpu

# A row of work for each block, up to so many; then one for each 2, 4, 8 ... blocks.
_MAX_WORK_ROWS = 4096
_NUMEL, _WIDTH = cpu.segment_fields.index("numel"), len(cpu.segment_fields)

Upload = Callable[[bytes], Tensor]


class DeviceTables:
    """What the launches of one bucket read on the device. Never overwritten: a change makes new.

    A launch that is still queued keeps reading its own tables: their memory goes back to torch's
    allocator, which hands it out again in the order of the stream only.
    """

    def __init__(self, upload: Upload) -> None:
        self._upload = upload
        self._kept: dict[str, tuple[object, Tensor]] = {}
        self.blocks = self.run = 0  # how many blocks the work is for, and log2 of those of a row

    def rows(self, name: str, rows: bytes) -> Tensor:
        """The table `name` on the device, with these rows."""
        return self._keep(name, rows, lambda: rows)

    def segments(
        self, bucket: cpu.Bucket, chunk: int
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """The bucket's segments, their gradients, their LowMemory (None for plain dtypes), and the
        work; sets `blocks` and `run`.

        Args:
            chunk: elements that one block steps.
        """
        rows = bucket.segment_rows
        segments = self.rows("segments", rows)
        grads = self.rows("grads", bucket.grad_rows)
        extra = bucket.low_memory_rows
        low_memory = self.rows("low_memory", extra) if extra else None
        numels = np.frombuffer(rows, np.int64)[_NUMEL::_WIDTH]
        return segments, grads, low_memory, self._work(numels, chunk)

    def gradients(self, bucket: cpu.GradientBucket, chunk: int) -> tuple[Tensor, Tensor]:
        """The gradients of a bucket whose norm is wanted, and the work; sets `blocks` and `run`."""
        rows = bucket.rows
        numels = np.frombuffer(rows, np.int64)[1::2]
        return self.rows("grads", rows), self._work(numels, chunk)

    def _work(self, numels: np.ndarray, chunk: int) -> Tensor:
        def make() -> bytes:
            self.blocks, self.run, work = plan(numels, chunk)
            return work.tobytes()

        return self._keep("work", (numels.tobytes(), chunk), make)

    def _keep(self, name: str, key: object, make: Callable[[], bytes]) -> Tensor:
        kept = self._kept.get(name)
        if kept is None or kept[0] != key:
            self._kept[name] = kept = (key, self._upload(make()))
        return kept[1]


def tables_of(
    bucket: cpu.Bucket | cpu.GradientBucket, stream: int, upload: Upload, *, keep: bool = True
) -> DeviceTables:
    """The tables of a bucket as the last step on this stream left them, or empty ones.

    Args:
        upload: copies rows to the bucket's device, in the order of the stream.
        keep: False for tables of their own, which must not be seen by another step: while a CUDA
            graph is captured, memory and uploads belong to the graph.
    """
    if not keep:
        return DeviceTables(upload)
    if bucket.cache is None:
        bucket.cache = {}
    return bucket.cache.setdefault(stream, DeviceTables(upload))


def plan(numels: np.ndarray, chunk: int) -> tuple[int, int, np.ndarray]:
    """How many blocks step segments of these sizes, log2 of the blocks of a row, and the rows.

    Row i says where block `i << run` begins: int32 [rows, 2], segment and chunk.
    """
    blocks = -(-numels // chunk)
    ends = np.cumsum(blocks)
    total = int(ends[-1]) if len(ends) else 0
    run = 0
    while total > _MAX_WORK_ROWS << run:
        run += 1
    starts = np.arange(0, total, 1 << run)
    segment = np.searchsorted(ends, starts, side="right")
    return total, run, np.stack([segment, starts - (ends - blocks)[segment]], 1).astype(np.int32)


def upload_pinned(device: torch.device) -> Upload:
    """An upload by torch: through pinned memory, for which the host does not wait."""

    def upload(rows: bytes) -> Tensor:
        host = torch.from_numpy(np.frombuffer(rows, np.int64).copy())
        return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)

    return upload
