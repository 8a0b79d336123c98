"""The experiments, one module each."""

from importlib import import_module

from ..harness.experiment import Experiment

NAMES = (  # in the order of the page
    *("approximation", "variance", "average", "warmup"),
    *("noise", "travel", "counterexample"),
    *("search", "controls", "distortion", "robustness"),
)
EXPERIMENTS = {name: Experiment.from_module(import_module(f".{name}", __name__)) for name in NAMES}
