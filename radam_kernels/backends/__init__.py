"""The registry of backends: which there are, which work here and why not, and which one to take."""

import warnings
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any, Protocol

from ..scaling import Scaling

# Best first for each type of device; "auto" takes the first that works.
_MODULES = {"cuda": "cuda", "cpu": "cpu", "triton": "triton_", "reference": "reference"}
NAMES = tuple(_MODULES)
_PREFERENCE = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpu", "reference")}


class Backend(Protocol):
    """What every module in this folder offers."""

    def why_not(self, device_type: str, capturable: bool = False) -> str | None:
        """Why the backend can't step tensors on "cpu" or "cuda" here; None if it can.

        With `capturable`, their step counts are there too, and the backend has to advance them.
        """

    def step_(self, bucket, table, groups: list[dict[str, Any]], scaling: Scaling) -> None:
        """Steps a bucket's segments in place; advances its step counts if it is capturable.

        Args:
            bucket: a Bucket of the module _cpu, which has checked the tensors in it: dense, of
                one layout, on one device, of one supported dtype set, sharing no memory.
            table: the Table that the bucket belongs to, for its scalars.
            groups: the hyperparameters that the scalars come from.
            scaling: for capturable buckets; its tensors may be on another device.
        """


@cache
def why_not(name: str, device_type: str, capturable: bool = False) -> str | None:
    """Why backend `name` can't step tensors on `device_type` here; None if it can."""
    return _module(name).why_not(device_type, capturable)


def available_backends() -> dict[str, str | None]:
    """Every backend by name: None if it works here, else the reason why it does not.

    A backend works if it can step tensors of some type of device that is there.
    """
    reasons = {}
    for name in NAMES:
        found = [why_not(name, device_type) for device_type in _PREFERENCE]
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
def resolve(name: str, device_type: str, capturable: bool = False) -> Callable:
    """The step_ function of backend `name`, or of the best one, for tensors on `device_type`.

    Raises RuntimeError where there is none. One named explicitly never gives way to another.
    """
    for candidate in _PREFERENCE.get(device_type, ()) if name == "auto" else (name,):
        if why_not(candidate, device_type, capturable) is None:
            if name == "auto" and candidate == "reference":
                reasons = [why_not(n, device_type, capturable) for n in _PREFERENCE[device_type]]
                warnings.warn(
                    f"radam_kernels: no kernel steps {device_type!r} parameters here"
                    f"{' with capturable=True' * capturable}, so the slow reference does: "
                    + "; ".join(filter(None, reasons)),
                    stacklevel=2,
                )
            return _module(candidate).step_
    if name == "auto":
        raise RuntimeError(f"no backend steps parameters on {device_type!r} devices; {_working()}")
    raise RuntimeError(
        f"backend {name!r} can't step parameters on {device_type!r}: "
        f"{why_not(name, device_type, capturable)}; {_working()}"
    )


def _module(name: str) -> Backend:
    return import_module(f"{__name__}.{_MODULES[name]}")


def _working() -> str:
    return f"those that work here are {[n for n, why in available_backends().items() if not why]}"
