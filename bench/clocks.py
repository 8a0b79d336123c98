"""Clocks for one step: its time on the device and on the host, with the caches swept before it."""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

HOST_SWEEP = 64 << 20  # bytes written before a step to find a CPU's caches cold
SWEEP = 3  # the same on a GPU, in sizes of its L2 cache
LONGEST_LEAD = 0.1  # seconds


class Sample(NamedTuple):
    """Seconds of a step."""

    device: float
    host: float  # of the call alone, which waits for nothing
    waited: bool  # the host was late, so `device` may hold time in which nothing ran


class CudaClock:
    """CUDA events around a step that is enqueued behind a sleep, so that gaps are the device's own.

    triton.testing.do_bench has no such sleep: where the host is slower than the device, as with
    many small tensors, its times hold gaps in which the device waits for the host. The sweep
    writes rather than reads: it leaves dirty lines which the step must evict, as it leaves some
    itself that it never pays for. Rotated buffers would need several times the memory.
    """

    def __init__(self, device: torch.device) -> None:
        properties = torch.cuda.get_device_properties(device)
        l2 = getattr(properties, "L2_cache_size", 64 << 20)
        self._sweep = torch.empty(SWEEP * l2, dtype=torch.uint8, device=device)
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cycles = 1_000_000
        for _ in range(3):  # the first loads code, and wakes the clocks up
            self._begin.record()
            torch.cuda._sleep(cycles)
            self._end.record()
            self._end.synchronize()
        self._cycles = cycles / (self._begin.elapsed_time(self._end) / 1e3)  # a second

    def sample(self, step: Callable[[], object], lead: float) -> Sample:
        """Times a step; the device sleeps for `lead` seconds first, for the host to be ahead."""
        torch.cuda.synchronize()
        torch.cuda._sleep(int(lead * self._cycles))
        self._sweep.fill_(1)
        self._begin.record()
        begin = time.perf_counter()
        step()
        host = time.perf_counter() - begin
        self._end.record()
        waited = self._begin.query()
        self._end.synchronize()
        return Sample(self._begin.elapsed_time(self._end) / 1e3, host, waited)

    def synchronize(self) -> None:
        torch.cuda.synchronize()


class HostClock:
    """time.perf_counter: torch.utils.benchmark.Timer would set the number of threads to one, and
    its blocks of calls leave no room for a sweep between them."""

    def __init__(self, sweep: int) -> None:
        self._sweep = torch.empty(sweep, dtype=torch.uint8)

    def sample(self, step: Callable[[], object], lead: float) -> Sample:
        self._sweep.fill_(1)
        begin = time.perf_counter()
        step()
        host = time.perf_counter() - begin
        return Sample(host, host, False)

    def synchronize(self) -> None:
        pass


def find_lead(clock: CudaClock | HostClock, step: Callable[[], object]) -> float:
    """Seconds for the device to sleep, so that the host is done before the step begins.

    0 where no sleep helps: a step of more launches than the device's queue holds (some 1,000)
    stops the host until the sleep is over, and its host time would be that of the sleep.
    """
    lead = 1e-3
    while lead <= LONGEST_LEAD:
        sample = clock.sample(step, lead)
        if not sample.waited:
            return min(2 * sample.host + 1e-4, LONGEST_LEAD)
        lead = 2 * max(lead, sample.host)
    return 0.0
