"""The experiments, in the order of the page."""

from .experiment import Experiment

EXPERIMENTS: dict[str, Experiment] = {experiment.name: experiment for experiment in ()}
