"""The experiments, one module each, in the order of the page."""

from ..harness.experiment import Experiment
from . import (
    approximation,
    average,
    controls,
    counterexample,
    distortion,
    noise,
    robustness,
    search,
    travel,
    variance,
    warmup,
)

MODULES = (
    *(approximation, variance, average, warmup),
    *(noise, travel, counterexample),
    *(search, controls, distortion, robustness),
)
EXPERIMENTS = {e.name: e for e in map(Experiment.from_module, MODULES)}
