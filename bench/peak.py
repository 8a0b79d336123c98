"""Memory that steps need beyond parameters, gradients and two moments: the peak of a fresh process.

Linux tells it, in STATUS.
"""

import multiprocessing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from .contenders import everyone

STATUS = Path("/proc/self/status")
SLOW_IMPORTS = ("torch._dynamo", "optimi", "pytorch_optimizer")  # by a first step; once for all


class Point(NamedTuple):
    optimizer: str
    elements: int  # of a tensor, float32
    tensors: int


def extra_bytes(points: Sequence[Point]) -> Iterator[int]:
    """The answer for each point in turn, each from a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *SLOW_IMPORTS])
    with context.Pool(1, maxtasksperchild=1) as pool:
        yield from pool.imap(measure, points)


def measure(point: Point) -> int:
    """In this process, which must not have had more memory at any time before."""
    torch.set_num_threads(1)  # threads take no part in it, and with others at work they wait long
    contender = next(c for c in everyone(torch.float32, "cpu") if c.name == point.optimizer)
    contender.start(_params(1, 1))  # a first step loads code, which is not the question
    params = _params(point.elements, point.tensors)
    before = _peak()
    contender.start(params)
    moments = 2 * sum(param.nbytes for param in params)
    return _peak() - before - moments


def _params(elements: int, tensors: int) -> list[torch.Tensor]:
    params = [torch.ones(elements).requires_grad_() for _ in range(tensors)]
    for param in params:
        param.grad = torch.ones(elements)
    return params


def _peak() -> int:
    """Bytes of memory that this process has had at once, at most."""
    return 1024 * int(STATUS.read_text().partition("VmHWM:")[2].split()[0])
