"""Means with confidence intervals."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats


class Mean(NamedTuple):
    """Means over the first axis of samples, and half the width of each one's interval."""

    mean: np.ndarray
    half: np.ndarray

    def __format__(self, spec: str) -> str:
        return f"{self.mean:{spec}} ± {self.half:{spec.lstrip('+')}}"

    def is_positive(self) -> bool | None:
        """Whether a mean is greater than 0; None where its interval contains 0."""
        return None if abs(self.mean) <= self.half else bool(self.mean > 0)

    def is_negative(self) -> bool | None:
        """Whether a mean is less than 0; None where its interval contains 0."""
        return Mean(-self.mean, self.half).is_positive()


def mean_interval(samples: ArrayLike, confidence: float = 0.95) -> Mean:
    """Student's t interval for at least two independent samples along the first axis."""
    samples = np.asarray(samples, dtype=float)
    count = len(samples)
    if count < 2:
        raise ValueError(f"samples: expected at least 2 for an interval, got {count}")
    quantile = stats.t.ppf(0.5 + confidence / 2, count - 1)
    return Mean(samples.mean(axis=0), quantile * stats.sem(samples, axis=0))
