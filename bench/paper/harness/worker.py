"""What a worker process executes; imports no library, so that threads can still be limited."""

import os
import signal
import time

from .experiment import Row, Run

ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}


def initialize() -> None:
    """Limits libraries to one thread, and prints no traceback at an interrupt."""
    os.environ.update(ONE_THREAD)  # NumPy and torch read it when the run imports them
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def timed(run: Run) -> tuple[list[Row], float]:
    """The run's rows and its duration in seconds."""
    start = time.perf_counter()
    rows = run.function(**run.arguments)
    return rows, time.perf_counter() - start
