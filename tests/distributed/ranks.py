"""Runs a test function on several processes at once, as ranks of one gloo process group."""

import datetime
import importlib
import os
import signal
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.fork_server import run_in_fork

SKIPPED = "skipped:"
GRACE_S = 3  # for ranks whose peer has failed: they may fail for a reason of their own


def run(module: str, name: str, arguments: dict[str, Any], world: int, timeout: float) -> None:
    """Calls `module.name(**arguments)` on `world` ranks, forks of this process.

    Raises SystemExit, after printing the output of the failed ranks, unless all return in time.
    Prints SKIPPED and the reason if the function skips its test.
    """
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, f"output{rank}") for rank in range(world)]
        ranks = {}
        for rank in range(world):
            arguments_of_rank = (module, name, arguments, rank, world, Path(folder) / "store")
            with outputs[rank].open("w") as output:
                ranks[run_in_fork(partial(_run_rank, *arguments_of_rank), output)] = rank
        failures = _wait(ranks, timeout)
        if (skipped := Path(folder, "skipped")).exists() and not failures:
            print(SKIPPED, skipped.read_text())
        for rank, failure in failures.items():  # the first to fail first
            print(f"rank {rank} of {world}: {failure}\n{outputs[rank].read_text()[-3000:]}")
    if failures:
        raise SystemExit(1)


def _run_rank(
    module: str, name: str, arguments: dict[str, Any], rank: int, world: int, file: Path
) -> None:
    patience = datetime.timedelta(seconds=30)
    store = dist.FileStore(str(file), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=patience)
    try:
        getattr(importlib.import_module(module), name)(**arguments)
    except pytest.skip.Exception as skipped:
        file.with_name("skipped").write_text(str(skipped))
    dist.barrier()  # none leaves while another still needs it


def _wait(ranks: dict[int, int], timeout: float) -> dict[int, str]:
    """Waits for processes; returns why each rank failed. Kills what is left."""
    end = time.monotonic() + timeout
    left, failures = dict(ranks), {}
    while left and time.monotonic() < end:
        done, status = os.waitpid(-1, os.WNOHANG)
        if not done:
            time.sleep(0.002)
            continue
        rank = left.pop(done)
        if code := os.waitstatus_to_exitcode(status):
            failures[rank] = f"exit code {code}"
            end = min(end, time.monotonic() + GRACE_S)
    for child, rank in left.items():
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        failures[rank] = "killed, because a rank had failed" if failures else f"over {timeout} s"
    return failures
