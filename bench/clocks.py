"""Clocks for one step: its time on the device, and on the host, with the caches emptied before."""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

SWEEP = 3  # times the L2 cache: what is written before a timed step, so that it starts cold
LONGEST_LEAD = 0.1  # seconds


class Sample(NamedTuple):
    """Seconds of a step."""

    device: float
    host: float  # of the call alone: it waits for nothing
    waited: bool  # the host was late, so `device` may hold time in which nothing ran


class CudaClock:
    """CUDA events around a step that is enqueued behind a sleep, so that gaps are the device's own.

    The sweep writes rather than reads: it leaves dirty lines which the step must evict, as it
    leaves some itself that it never pays for. Rotated buffers would need several times the memory.
    """

    def __init__(self, device: torch.device) -> None:
        properties = torch.cuda.get_device_properties(device)
        self.l2 = getattr(properties, "L2_cache_size", 64 << 20)
        self._sweep = torch.empty(SWEEP * self.l2, dtype=torch.uint8, device=device)
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._cycles = 1_000_000 / self._sleep_seconds(1_000_000)  # a second
        self.words = (
            f"CUDA events behind a sleep; before each timed step {SWEEP}x the L2 cache "
            f"({self.l2 >> 20} MiB) is written"
        )

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

    def _sleep_seconds(self, cycles: int) -> float:
        for _ in range(3):  # the first loads code, and wakes the clocks up
            self._begin.record()
            torch.cuda._sleep(cycles)
            self._end.record()
            self._end.synchronize()
        return self._begin.elapsed_time(self._end) / 1e3


class HostClock:
    """The clock of a CPU's steps; where it stands in for a GPU's its numbers say nothing of one."""

    def __init__(self, sweep: int = 1 << 10) -> None:
        self._sweep = torch.empty(sweep, dtype=torch.uint8)
        self.words = "the host's clock, to try the code without a GPU"

    def sample(self, step: Callable[[], object], lead: float) -> Sample:
        self._sweep.fill_(1)
        begin = time.perf_counter()
        step()
        host = time.perf_counter() - begin
        return Sample(host, host, False)

    def synchronize(self) -> None:
        pass


Clock = CudaClock | HostClock


def make_clock(device: torch.device) -> Clock:
    return CudaClock(device) if device.type == "cuda" else HostClock()


def find_lead(clock: Clock, step: Callable[[], object]) -> float:
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
