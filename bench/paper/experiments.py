"""The experiments, in the order of the page."""

from . import approximation, variance
from .experiment import Experiment

EXPERIMENTS: dict[str, Experiment] = {
    module.EXPERIMENT.name: module.EXPERIMENT for module in (approximation, variance)
}
