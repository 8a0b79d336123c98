"""Profiler ranges for the stages of a step; 0.1 us when no profiler is active.

For torch.profiler, `torch.autograd.profiler.emit_nvtx`, and nsys on a CUDA build.
"""

import os
from contextlib import AbstractContextManager

import torch
from torch.profiler import record_function

# nsys and other NVTX tools set this variable for the programs that they start.
_NVTX = "NVTX_INJECTION64_PATH" in os.environ and torch.version.cuda is not None


class Stages:
    """The stages of one step, each a profiler range."""

    def __init__(self) -> None:
        self._open: list[AbstractContextManager] = []

    def enter(self, name: str | None) -> None:
        """Ends the current stage and begins the stage `name`, unless that is None."""
        while self._open:
            self._open.pop().__exit__(None, None, None)
        if name is not None:
            name = f"radam_kernels.{name}"
            self._begin(record_function(name))
            if _NVTX:
                self._begin(torch.cuda.nvtx.range(name))

    def _begin(self, range_: AbstractContextManager) -> None:
        range_.__enter__()
        self._open.append(range_)


def listen() -> Stages | None:
    """The stages of this step, for a profiler; None if none is active."""
    return Stages() if _NVTX or torch.autograd._profiler_enabled() else None
