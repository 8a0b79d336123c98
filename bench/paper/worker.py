"""What happens in a process of the runner; light to load, for what a run needs it loads itself."""

import os
import signal
import time

from .experiment import Row, Run

ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}


def begin() -> None:
    """One thread, and no traceback when the user interrupts."""
    # Read when numpy or torch are loaded, which this module and the runner's pool leave to the run.
    os.environ.update(ONE_THREAD)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def timed(run: Run) -> tuple[list[Row], float]:
    """The run's rows, and the seconds it took."""
    start = time.perf_counter()
    rows = run.function(**run.arguments)
    return rows, time.perf_counter() - start
