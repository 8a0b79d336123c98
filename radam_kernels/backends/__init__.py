"""The registry of backends: availability, with reasons, and dispatch by device type."""

import warnings
from functools import cache
from importlib import import_module
from typing import Literal, Protocol, TypeAlias, cast, get_args

from torch import Tensor

from .. import modules
from . import devices

BackendName: TypeAlias = Literal["cuda", "cpu", "triton", "reference"]
BackendChoice: TypeAlias = Literal["auto"] | BackendName
NAMES: tuple[BackendName, ...] = get_args(BackendName)


class Backend(Protocol):
    """The interface of a backend module in this folder."""

    __name__: str

    def why_not(self, device_type: str) -> str | None:
        """Why the backend can't step tensors on this type of device here; None if it can."""

    def run(self, bucket: modules.cpu.Bucket) -> None:
        """Steps a bucket's segments in place; advances its step counts if it is capturable.

        Args:
            bucket: its tensors are validated: dense, with one layout, one device and a supported
                dtype set, and without shared memory.
        """

    def power_sum(self, bucket: modules.cpu.GradientBucket, norm_type: float) -> Tensor:
        """The sum of |g|**norm_type over a bucket's gradients, or the largest |g| if that is inf.

        Does not synchronize. The result does not depend on the number of threads or blocks.

        Args:
            bucket: its gradients are dense, on one device and of one dtype.
            norm_type: 1, 2 or inf; only 2 for complex gradients.

        Returns:
            A float64 tensor of shape () on the bucket's device.
        """
        ...


@cache
def why_not(name: str, device_type: str) -> str | None:
    """Why backend `name` can't step tensors on `device_type` here; None if it can."""
    return _module(name).why_not(device_type)


def available_backends() -> dict[BackendName, str | None]:
    """Maps each backend's name to None if it works here, or to the reason why it does not.

    A backend works if it can step tensors on some type of device that is available.
    """
    reasons: dict[BackendName, str | None] = {}
    for name in NAMES:
        found = [why_not(name, row.name) for row in devices.DEVICE_TYPES]
        reasons[name] = None if None in found else found[0]
    return reasons


def check_name(name: BackendChoice) -> None:
    """Raises ValueError for an unknown backend, RuntimeError for one that does not work here."""
    if name == "auto":
        return
    if name not in NAMES:
        raise ValueError(f"backend: expected 'auto' or one of {NAMES}, got {name!r}")
    if reason := available_backends()[name]:
        raise RuntimeError(f"backend {name!r} does not work here: {reason}; {_working()}")


@cache
def resolve(name: str, device_type: str) -> Backend:
    """The backend for tensors on `device_type`; the best one for "auto".

    Raises RuntimeError if there is none. A backend named explicitly never falls back to another.
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
            return _module(candidate)
    if name == "auto":
        raise RuntimeError(f"no backend steps parameters on {device_type!r} devices; {_working()}")
    raise RuntimeError(
        f"backend {name!r} can't step parameters on {device_type!r}: "
        f"{why_not(name, device_type)}; {_working()}"
    )


def _module(name: str) -> Backend:
    # Not triton.py: that is the package which it imports.
    module = import_module(f".{'triton_' if name == 'triton' else name}", __name__)
    return cast(Backend, module)


def _working() -> str:
    return f"those that work here are {[n for n, why in available_backends().items() if not why]}"
