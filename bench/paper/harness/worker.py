"""What a worker process executes; imports no library, so that threads can still be limited."""

import os
import signal
import time

from .experiment import Row, Run


def initialize() -> None:
    """Limits libraries to one thread, and prints no traceback at an interrupt."""
    for library in ("OMP", "MKL", "OPENBLAS"):  # read when the run imports NumPy or torch
        os.environ[f"{library}_NUM_THREADS"] = "1"
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def timed(run: Run) -> tuple[list[Row], float]:
    """The run's rows and its duration in seconds."""
    start = time.perf_counter()
    rows = run.function(**run.arguments)
    return rows, time.perf_counter() - start
