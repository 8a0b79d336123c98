"""How the cost of a step grows with elements and tensors: lines fitted to what was measured."""

from typing import NamedTuple

import numpy as np
import pandas as pd

from .timing import LARGE


class Line(NamedTuple):
    """cost = fixed + each * work."""

    fixed: float
    each: float
    error: float  # the largest of a point, as a part of it


def fit(work: pd.Series, cost: pd.Series, scale: pd.Series, least: int = 3) -> Line | None:
    """The least squares of errors in parts of `scale`; None for fewer than `least` points."""
    if len(work) < least:
        return None
    each, fixed = np.polyfit(work, cost, 1, w=1 / scale)
    error = (abs(fixed + each * work - cost) / scale).max()
    return Line(float(fixed), float(each), float(error))


def growth(frame: pd.DataFrame, optimizer: str) -> dict[tuple[str, str], Line | None]:
    """Lines of "ms" and "extra_bytes" by "elements" and "tensors".

    From float32, gradients held, caches warm: one tensor of LARGE elements and more, and tensors
    of 64.
    """
    held = (frame.optimizer == optimizer) & (frame.dtype == "float32") & (frame.gradients == "held")
    found = {}
    # Memory does not scatter: two points are enough.
    for kind, cost, least in (("step", "ms", 3), ("memory", "extra_bytes", 2)):
        points = frame[held & (frame.kind == kind)].dropna(subset=cost)
        large = points[(points.tensors == 1) & (points.elements >= LARGE)]
        lists = points[points.elements == 64 * points.tensors]
        for work, some in (("elements", large), ("tensors", lists)):
            scale = some[cost if kind == "step" else work]
            found[cost, work] = fit(some[work], some[cost], scale, least)
    return found
