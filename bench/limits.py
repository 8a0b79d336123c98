"""What a step is held against, measured beside it: a streaming loop on the CPU, a copy on a GPU."""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import stream
from .contenders import Contender, copy_name

# Each time: caches and clocks are to be as they are in the step's rounds, which are many.
WARM, SECONDS = 0.02, 0.05
PASSES = 3  # at least
MOMENTS = ("exp_avg", "exp_avg_sq")


class Limit:
    """Passes over a step's bytes, before and after the step's own rounds: a drift hits both."""

    def __init__(
        self,
        contender: Contender,
        params: Sequence[Tensor],
        optimizer: torch.optim.Optimizer | None,
    ) -> None:
        self.seconds: list[float] = []
        self.absent, self.kind, self.run = "", "streaming loop", lambda: None
        self._ceiling = 0.0
        if params[0].device.type == "cuda":
            self.kind = "copy"
            self.run = synchronized(Contender(copy_name(0), contender.bytes).start(params).step)
            return
        dtype = params[0].dtype
        try:
            state = _moments_dtype(contender.bytes, dtype)
            self.run = stream.Stream(*_streams(params, optimizer, state))
            if (
                optimizer and state.itemsize == 2
            ):  # so few bytes that dividing can take longer than they do
                elements = sum(param.numel() for param in params)
                self._ceiling = elements / divisions(state)
        except (RuntimeError, ValueError) as error:
            self.absent = str(error)

    def measure(self) -> None:
        """A few passes; nothing where there is no limit."""
        if self.absent:
            return
        begin = time.perf_counter()
        self.run()
        while time.perf_counter() - begin < WARM:
            self.run()
        begin, passes = time.perf_counter(), 0
        while passes < PASSES or time.perf_counter() - begin < SECONDS:
            before = time.perf_counter()
            self.run()
            self.seconds.append(time.perf_counter() - before)
            passes += 1

    def against(self, median: float, moved: int) -> dict[str, Any]:
        """What a row says: of a step's median in seconds, and the bytes it had to move."""
        row: dict[str, Any] = {"bytes": moved, "gb_s": moved / median / 1e9}
        if self.absent:
            return {**row, "limit": f"none: {self.absent}"}
        streamed = statistics.median(self.seconds)
        slowest = max(streamed, self._ceiling)
        return {
            **row,
            "limit": self.kind if slowest == streamed else "divisions and square roots in cache",
            "limit_gb_s": moved / slowest / 1e9,
            "stream_gb_s": moved / streamed / 1e9,
            "share_of_limit": slowest / median,
        }


def synchronized(step: Callable[[], object]) -> Callable[[], None]:
    """The step on a GPU, and the wait for it."""

    def run() -> None:
        step()
        torch.cuda.synchronize()

    return run


divisions = cache(stream.divisions)


def _moments_dtype(moved: int, dtype: torch.dtype) -> torch.dtype:
    """Of moments that make a step move so many bytes for each element."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for state in (dtype, wide):
        if moved == 3 * dtype.itemsize + 4 * state.itemsize:
            return state
    raise ValueError(f"no loop moves {moved} bytes for each element of {dtype}")


def _streams(
    params: Sequence[Tensor], optimizer: torch.optim.Optimizer | None, dtype: torch.dtype
) -> list[list[Tensor]]:
    """The very tensors of the step, or new ones in the place of moments that are not like that."""

    def moment(param: Tensor, name: str) -> Tensor:
        found = optimizer.state[param].get(name) if optimizer else None
        if found is None or found.dtype != dtype or found.numel() != param.numel():
            return torch.zeros_like(param, dtype=dtype, requires_grad=False)
        return found

    return [
        [param.detach() for param in params],
        [param.grad for param in params],
        *([moment(param, name) for param in params] for name in MOMENTS),
    ]
