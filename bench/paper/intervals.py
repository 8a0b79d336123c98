"""Means with the interval that goes with them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats


class Mean(NamedTuple):
    """Means over the first axis, each with half the width of its 95% interval (Student's t)."""

    mean: np.ndarray
    half: np.ndarray


def mean_interval(samples: ArrayLike, confidence: float = 0.95) -> Mean:
    """Of independent samples along the first axis, at least two of them."""
    samples = np.asarray(samples, dtype=float)
    count = len(samples)
    if count < 2:
        raise ValueError(f"samples: expected at least 2 for an interval, got {count}")
    quantile = stats.t.ppf(0.5 + confidence / 2, count - 1)
    return Mean(samples.mean(axis=0), quantile * stats.sem(samples, axis=0))
