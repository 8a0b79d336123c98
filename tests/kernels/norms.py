"""What the norm kernels are held to: cases, the exact answer, and how far from it they may be."""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from radam_kernels.modules import cpu
from tests.helpers import SIZES

NORMS = (1.0, 2.0, math.inf)

# Relative, of the sum of powers: a float32 product, and so many float32 additions in a row.
CUDA_ERROR = (1 + 10) * 2.0**-24
TRITON_ERROR = (1 + 13) * 2.0**-24
FLOAT64_ERROR = 1e-14


class Gradients:
    """Gradients of one dtype and device, read as an optimizer reads them."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors
        self._gradients = cpu.Gradients()

    @property
    def bucket(self) -> cpu.GradientBucket:
        """Of the tensors as they are now."""
        params = [torch.empty_like(t) for t in self.tensors]
        for param, tensor in zip(params, self.tensors, strict=True):
            param.grad = tensor
        assert self._gradients.refresh([{"params": params}], {}) == []
        [bucket] = self._gradients.buckets
        return bucket


def power_sum(tensors: list[Tensor], norm_type: float) -> float:
    """The exact sum of |g|**norm_type, rounded to float64; the largest |g| for inf."""
    numbers = torch.cat([t.cpu().double().flatten() for t in tensors]).abs().numpy()
    if np.isnan(numbers).any():
        return math.nan
    if norm_type == math.inf:
        return float(numbers.max(initial=0))
    return math.fsum(numbers**norm_type)  # of float32 these squares are exact


def assert_close(ours: float, tensors: list[Tensor], norm_type: float, error: float) -> None:
    """Compares with the exact answer.

    Args:
        error: relative, where the sums are float32.
    """
    truth = power_sum(tensors, norm_type)
    if tensors[0].dtype == torch.float64:
        error = FLOAT64_ERROR
    same = ours == truth or (math.isnan(ours) and math.isnan(truth))
    close = norm_type != math.inf and math.isfinite(truth) and abs(ours - truth) <= error * truth
    assert same or close, (
        f"{ours!r}, not {truth!r}: off by {(ours - truth) / truth if truth else 1}"
    )


def cases(dtype: torch.dtype, chunk: int) -> Iterator[tuple[str, list[Tensor]]]:
    """Gradients by what is special about them.

    Args:
        chunk: elements that a block adds up.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    around = (chunk - 1, chunk, chunk + 1, 2 * chunk, 2 * chunk + 3)
    yield "no elements", [normal(0)]
    for size in (*SIZES, *around):
        yield f"{size} elements", [normal(size)]
    yield "all sizes at once", [normal(size) for size in (*SIZES, *around)]
    yield "many small ones", [normal(i % 71) for i in range(100)]
    info = torch.finfo(dtype)
    smallest = info.smallest_normal * info.eps
    values = [smallest, 3 * smallest, info.smallest_normal, info.max, -info.max]
    values += [v for v in (1e-24, 1e25, 3e38) if info.smallest_normal < v < info.max]
    if dtype == torch.float64:  # whose squares are float64 as well
        values = [1e-140, 1e-24, 1e25, 3e38, 1e140]
    for value in (0.0, -0.0, *values):
        yield f"all {value}", [torch.full((n,), value, dtype=dtype) for n in (5, chunk, 300)]
    large = info.max if dtype != torch.float64 else 1e140
    mixed = normal(chunk + 300)
    mixed[::7] *= smallest / info.eps
    mixed[::50] = large
    yield "small and large ones", [mixed]
    for value, places in (
        (-math.inf, ((chunk, 0), (chunk + 5, chunk + 4))),
        (-math.nan, ((chunk, 0), (chunk, chunk - 1), (chunk + 5, chunk + 4), (3, 2), (7, 0))),
    ):
        for size, place in places:
            special = normal(size)
            special[place] = value
            yield f"{value} at {place} of {size}", [normal(300), special, normal(5)]
    both = normal(chunk)
    both[5], both[chunk // 2] = math.inf, math.nan
    yield "inf and NaN", [both]
    both = normal(chunk)
    both[5], both[chunk // 2] = math.nan, math.inf
    yield "NaN and inf", [both]
