"""Rectified Adam (RAdam) for PyTorch as fused kernels: one pass over memory."""

from importlib.metadata import PackageNotFoundError, version

from . import schedule
from .backends import available_backends
from .flat import flatten_
from .functional import radam_
from .optimizer import RAdam

try:
    __version__ = version("radam_kernels")
except PackageNotFoundError:  # built in the tree with CMake, and not installed
    __version__ = "unknown"

__all__ = ["RAdam", "available_backends", "flatten_", "radam_", "schedule"]
