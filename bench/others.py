"""Whether other processes were at work while something was timed: then the times say little."""

import os
import time
from pathlib import Path

STAT = Path("/proc/stat")
DISTURBED = 0.3  # cores


class Others:
    """How many cores others kept busy on average, inside a `with`; None without /proc."""

    def __enter__(self) -> "Others":
        self.cores: float | None = None
        self._begin, self._before = time.perf_counter(), _busy()
        return self

    def __exit__(self, *_: object) -> None:
        after = _busy()
        if self._before is not None and after is not None:
            seconds = time.perf_counter() - self._begin
            self.cores = max(0.0, (after - self._before) / seconds)


def _busy() -> float | None:
    """Seconds that all cores have worked for others so far."""
    try:
        user, nice, system, _, _, *rest = STAT.read_text().split("\n")[0].split()[1:9]
    except (OSError, ValueError):
        return None
    ticks = sum(map(int, (user, nice, system, *rest)))
    return ticks / os.sysconf("SC_CLK_TCK") - time.process_time()
