"""Global and shared memory in which every access is checked."""

import numpy as np

from .arithmetic import UINT, Fault

BASE = 0x7F20_0000_0000  # where global memory begins


class Memory:
    """Buffers at invented addresses, with guard bytes around each, checked at every access."""

    GUARD = 0xA5

    def __init__(self, size: int) -> None:
        self.bytes = np.full(-(-size // 256) * 256, self.GUARD, np.uint8)
        self.writer = np.zeros(len(self.bytes), np.int32)  # in this launch: thread + 1
        self.starts, self.ends, self.names, self.writable = [], [], [], []
        self.cursor = 256

    def put(self, data: np.ndarray, name: str, writable: bool = False, skip: int = 0) -> int:
        """Copies an array to `skip` bytes behind a multiple of 256; returns its address."""
        raw = np.ascontiguousarray(data).view(np.uint8).reshape(-1)
        start = -(-(self.cursor + 64) // 256) * 256 + skip
        self.cursor = start + len(raw)
        if self.cursor + 256 > len(self.bytes):
            raise ValueError("the memory is full")
        self.bytes[start : self.cursor] = raw
        self.starts.append(start)
        self.ends.append(self.cursor)
        self.names.append(name)
        self.writable.append(writable)
        return BASE + start

    def get(self, address: int, dtype: np.dtype, count: int) -> np.ndarray:
        at = address - BASE
        return self.bytes[at : at + count * np.dtype(dtype).itemsize].copy().view(dtype)

    def begin_launch(self) -> None:
        self.writer[:] = 0
        self.tables = [np.array(t) for t in (self.starts, self.ends, self.writable)]

    def written(self, address: int, size: int) -> np.ndarray:
        """Which of these bytes the launch has written."""
        at = address - BASE
        return self.writer[at : at + size] != 0

    def guards_intact(self) -> bool:
        used = np.zeros(len(self.bytes), bool)
        for start, end in zip(self.starts, self.ends, strict=True):
            used[start:end] = True
        return bool((self.bytes[~used] == self.GUARD).all())

    def _buffer(self, at: np.ndarray) -> np.ndarray:
        return np.maximum(np.searchsorted(self.tables[0], at, "right") - 1, 0)

    def _at(self, address: np.ndarray, size: int, store: bool) -> np.ndarray:
        starts, ends, writable = self.tables
        if (bad := address % np.uint64(size) != 0).any():
            raise Fault(f"address {int(address[bad][0]):#x} is not a multiple of {size}", bad)
        at = (address - np.uint64(BASE)).view(np.int64)
        buffer = self._buffer(at)
        if (bad := (at < starts[buffer]) | (at + size > ends[buffer])).any():
            i = buffer[bad][0]
            raise Fault(
                f"{size} bytes at {int(address[bad][0]):#x} are outside of any buffer; the one "
                f"before is {self.names[i]}, {BASE + starts[i]:#x} to {BASE + ends[i]:#x}", bad,
            )  # fmt: skip
        if store and (bad := ~writable[buffer]).any():
            raise Fault(f"a store into {self.names[buffer[bad][0]]}", bad)
        return at

    def load(
        self, address: np.ndarray, count: int, size: int, who: np.ndarray, not_coherent: bool
    ) -> np.ndarray:
        """[lanes, count] elements of `size` bytes; `who` holds the threads' numbers + 1."""
        at = self._at(address, count * size, False)
        if not_coherent and (bad := self.tables[2][self._buffer(at)]).any():
            raise Fault("a load that is not coherent, where the kernel may store", bad)
        writer = self.writer.reshape(-1, count * size)[at // (count * size)]
        if (bad := ((writer != 0) & (writer != who[:, None])).any(1)).any():
            raise Fault("loads what another thread has stored: a race", bad)
        return self.bytes.view(UINT[8 * size]).reshape(-1, count)[at // (count * size)]

    def store(self, address: np.ndarray, values: np.ndarray, who: np.ndarray) -> None:
        count, size = values.shape[1], values.itemsize
        at = self._at(address, count * size, True)
        writer = self.writer.reshape(-1, count * size)
        place = at // (count * size)
        if (bad := (writer[place] != 0).any(1)).any():
            raise Fault("stores where there has been a store already", bad)
        writer[place] = who[:, None]
        if (bad := (writer[place] != who[:, None]).any(1)).any():
            raise Fault("two threads store to one place", bad)
        self.bytes.view(values.dtype).reshape(-1, count)[place] = values


class Shared:
    """Shared memory of all blocks; detects races between two barriers."""

    def __init__(self, size: int, blocks: int) -> None:
        self.size = -(-size // 16) * 16
        self.bytes = np.zeros(max(self.size, 16) * blocks, np.uint8)
        self.writer, self.reader = np.zeros((2, len(self.bytes)), np.int32)  # of a byte
        self.written, self.read = np.full((2, len(self.bytes)), -1)  # in which epoch
        self.epoch = np.zeros(blocks, np.int64)

    def access(
        self,
        address: np.ndarray,
        count: int,
        size: int,
        who: np.ndarray,
        block: np.ndarray,
        values: np.ndarray | None = None,
    ) -> np.ndarray | None:
        """Loads [lanes, count] elements of `size` bytes, or stores `values` if they are given."""
        wide = count * size
        if (bad := address % np.uint32(wide) != 0).any():
            raise Fault(f"address {int(address[bad][0]):#x} is not a multiple of {wide}", bad)
        if (bad := address.astype(np.int64) + wide > self.size).any():
            raise Fault(f"outside of the {self.size} bytes of shared memory", bad)
        at = (block * self.size + address)[:, None] + np.arange(wide)
        now, me = self.epoch[block][:, None], who[:, None]
        if (bad := ((self.written[at] == now) & (self.writer[at] != me)).any(1)).any():
            raise Fault("no barrier since another thread stored there", bad)
        if values is None:
            if (bad := (self.written[at] < 0).any(1)).any():
                raise Fault("loads shared memory that was never stored", bad)
            others = (self.read[at] == now) & (self.reader[at] != me)
            self.reader[at] = np.where(others, -1, me)
            # Of several lanes that load the same byte here the last one stays; the others differ.
            self.reader[at] = np.where(self.reader[at] == me, self.reader[at], -1)
            self.read[at] = now
            return self.bytes[at].view(UINT[8 * size])
        if (bad := ((self.read[at] == now) & (self.reader[at] != me)).any(1)).any():
            raise Fault("no barrier since another thread loaded that", bad)
        stored = np.ascontiguousarray(values).view(np.uint8)
        self.bytes[at] = stored
        if (bad := (self.bytes[at] != stored).any(1)).any():
            raise Fault("two threads store different values to one place", bad)
        self.writer[at], self.written[at] = me, now
        return None
