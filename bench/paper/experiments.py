"""The experiments, in the order of the page."""

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
from .experiment import Experiment

MODULES = (
    *(approximation, variance, average, warmup),
    *(noise, travel, counterexample),
    *(search, controls, distortion, robustness),
)
EXPERIMENTS: dict[str, Experiment] = {
    module.EXPERIMENT.name: module.EXPERIMENT for module in MODULES
}
