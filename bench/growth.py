"""How the cost of a step grows with elements and with tensors, fitted to what a report measured."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

LARGE = 1 << 22  # elements of float32 that no cache holds, with their gradients and moments


class Line(NamedTuple):
    """cost = fixed + each * work."""

    fixed: float
    each: float
    off: float  # the largest error of a point, as a part of it


class Growth(NamedTuple):
    """Of one optimizer, where there are points enough."""

    seconds_by_elements: Line | None
    seconds_by_tensors: Line | None
    bytes_by_elements: Line | None
    bytes_by_tensors: Line | None


def fit(work: Sequence[float], cost: Sequence[float], scale: Sequence[float] | None = None) -> Line:
    """The least squares of errors in parts of `scale`, which is the cost if not given."""
    x, y = np.asarray(work, float), np.asarray(cost, float)
    unit = y if scale is None else np.asarray(scale, float)
    (fixed, each), *_ = np.linalg.lstsq(np.stack([1 / unit, x / unit], 1), y / unit, rcond=None)
    errors = np.abs(fixed + each * x - y) / unit
    return Line(float(fixed), float(each), float(errors.max()))


def growth(results: dict[str, Any], optimizer: str) -> Growth:
    """Fits for float32, gradients held, caches warm."""
    large, lists = [], []
    for name, case in results["cases"].items():
        row = case["rows"].get(optimizer, {})
        if "ms" not in row or not name.endswith("float32"):
            continue
        seconds = row["ms"]["median"] / 1e3
        if case["tensors"] == 1 and case["elements"] >= LARGE:
            large.append((case["elements"], seconds))
        elif case["elements"] == 64 * case["tensors"]:
            lists.append((case["tensors"], seconds))
    points = results["memory"].get(optimizer, [])
    one = [(p["elements"], p["extra_bytes"]) for p in points if p["tensors"] == 1]
    many = [(p["tensors"], p["extra_bytes"]) for p in points if p["tensors"] > 1]
    return Growth(
        *(_through(found) for found in (large, lists)),
        *(_through(found, of_work=True) for found in (one, many)),
    )


def _through(points: list[tuple[int, float]], of_work: bool = False) -> Line | None:
    if len(points) < 2:
        return None
    work, cost = zip(*points, strict=True)
    return fit(work, cost, work if of_work else None)
