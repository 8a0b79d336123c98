"""The experiments, in the order of the page."""

from . import (
    approximation,
    average,
    controls,
    distortion,
    robustness,
    search,
    variance,
    warmup,
)
from .experiment import Experiment

EXPERIMENTS: dict[str, Experiment] = {
    module.EXPERIMENT.name: module.EXPERIMENT
    for module in (
        approximation,
        variance,
        average,
        warmup,
        search,
        controls,
        distortion,
        robustness,
    )
}
