"""The registry of backends: which there are, which work here and why not, and which one to take."""

import warnings
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Protocol

from . import devices

_MODULES = {"cuda": "cuda", "cpu": "cpu", "triton": "triton_", "reference": "reference"}
NAMES = tuple(_MODULES)


class Backend(Protocol):
    """What every module in this folder offers."""

    def why_not(self, device_type: str) -> str | None:
        """Why the backend can't step tensors on this type of device here; None if it can."""

    def run(self, bucket) -> None:
        """Steps a bucket's segments in place; advances its step counts if it is capturable.

        Args:
            bucket: a Bucket of the module _cpu, which has checked the tensors in it: dense, of
                one layout, on one device, of one supported dtype set, sharing no memory.
        """


@cache
def why_not(name: str, device_type: str) -> str | None:
    """Why backend `name` can't step tensors on `device_type` here; None if it can."""
    return _module(name).why_not(device_type)


def available_backends() -> dict[str, str | None]:
    """Every backend by name: None if it works here, else the reason why it does not.

    A backend works if it can step tensors of some type of device that is there.
    """
    reasons = {}
    for name in NAMES:
        found = [why_not(name, row.name) for row in devices.DEVICE_TYPES]
        reasons[name] = None if None in found else found[0]
    return reasons


def check_name(name: str) -> None:
    """Raises ValueError for a name that is none, RuntimeError for one that can't work here."""
    if name == "auto":
        return
    if name not in NAMES:
        raise ValueError(f"backend: expected 'auto' or one of {NAMES}, got {name!r}")
    if reason := available_backends()[name]:
        raise RuntimeError(f"backend {name!r} does not work here: {reason}; {_working()}")


@cache
def resolve(name: str, device_type: str) -> Callable:
    """The `run` function of backend `name`, or of the best one, for tensors on `device_type`.

    Raises RuntimeError where there is none. One named explicitly never gives way to another.
    """
    row = devices.BY_NAME.get(device_type)
    candidates = (name,) if name != "auto" else row.backends if row else ()
    for candidate in candidates:
        if why_not(candidate, device_type) is None:
            if name == "auto" and candidate == "reference":
                reasons = [why_not(n, device_type) for n in candidates]
                warnings.warn(
                    f"radam_kernels: no kernel steps {device_type!r} parameters here, so the slow "
                    "reference does: " + "; ".join(filter(None, reasons)),
                    stacklevel=2,
                )
            return _module(candidate).run
    if name == "auto":
        raise RuntimeError(f"no backend steps parameters on {device_type!r} devices; {_working()}")
    raise RuntimeError(
        f"backend {name!r} can't step parameters on {device_type!r}: "
        f"{why_not(name, device_type)}; {_working()}"
    )


def _module(name: str) -> Backend:
    return import_module(f"{__name__}.{_MODULES[name]}")


def _working() -> str:
    return f"those that work here are {[n for n, why in available_backends().items() if not why]}"
