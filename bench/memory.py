"""Memory that a step takes beyond parameters, gradients and moments: the peak of a fresh process.

Linux tells it, in /proc. A GPU's is measured with its times (bench/timing.py).
"""

import multiprocessing
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from .cases import Case
from .correctness import MEASURED, NOT_MEASURED, brief
from .optimizers import BY_NAME, Optimizer
from .timing import Row, describe, refusal

SLOW_IMPORTS = ("torch._dynamo", "optimi", "pytorch_optimizer")  # by a first step; once for all


def measure(
    case: Case,
    optimizers: Sequence[Optimizer],
    device: torch.device,
    *,
    deadline: float,
    refused: Mapping[str, Row],
    **_: object,
) -> list[Row]:
    """A row for each optimizer."""
    rows = []
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *SLOW_IMPORTS])
    with context.Pool(1, maxtasksperchild=1) as pool:
        for optimizer in optimizers:
            row = refusal(case, optimizer, device.type, refused, deadline)
            if not row:
                try:
                    extra = pool.apply(extra_bytes, (optimizer.name, case))
                    row = {"status": MEASURED, "reason": "", "extra_bytes": extra}
                except Exception as error:
                    row = {"status": NOT_MEASURED, "reason": brief(error)}
            rows.append({**describe(case), "optimizer": optimizer.name, **row})
    return rows


def extra_bytes(name: str, case: Case) -> int:
    """In this process, which must not have had more memory at any time before."""
    torch.set_num_threads(1)  # threads take no part in it, and on a busy machine they wait long
    device, size, row = torch.device("cpu"), case.dtype.itemsize, BY_NAME[name]
    # A first step loads code, which is not the question.
    row.start(Case("", case.dtype, [(1,)]).make(device))
    params = case.make(device)
    before = _peak()
    row.start(params)
    return _peak() - before - case.elements * (row.traffic(size) - 3 * size) // 2


def _peak() -> int:
    """Bytes of memory that this process has had at once, at most."""
    return 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
