"""How the cost of a step grows with elements and tensors: lines fitted to what was measured."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from .timing import LARGE


class Line(NamedTuple):
    """cost = fixed + each * work."""

    fixed: float
    each: float
    error: float  # the largest of a point, as a part of it


def fit(work: Sequence[float], cost: Sequence[float], scale: Sequence[float]) -> Line | None:
    """The least squares of errors in parts of `scale`; None for less than two points."""
    if len(work) < 2:
        return None
    x, y, unit = (np.asarray(values, float) for values in (work, cost, scale))
    (fixed, each), *_ = np.linalg.lstsq(np.stack([1 / unit, x / unit], 1), y / unit, rcond=None)
    errors = np.abs(fixed + each * x - y) / unit
    return Line(float(fixed), float(each), float(errors.max()))


def growth(frame: pd.DataFrame, optimizer: str) -> dict[str, Line | None]:
    """Seconds and bytes, by elements and by tensors: float32, gradients held, caches warm.

    Bytes are those beyond parameters, gradients and moments.
    """
    own = frame[(frame.optimizer == optimizer) & (frame.dtype == "float32")]
    found = {}
    for kind, column, unit in (("step", "ms", 1e-3), ("memory", "extra_bytes", 1)):
        if column not in own:
            continue
        points = own[(own.kind == kind) & (own.gradients == "held") & own[column].notna()]
        large = points[(points.tensors == 1) & (points.elements >= LARGE)]
        lists = points[points.elements == 64 * points.tensors]
        for work, some in (("elements", large), ("tensors", lists)):
            cost = unit * some[column]
            scale = cost if kind == "step" else some[work]
            found[f"{column} by {work}"] = fit(some[work], cost, scale)
    return found
