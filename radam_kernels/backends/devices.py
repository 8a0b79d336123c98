"""The types of devices whose tensors can be stepped, and what a launch asks of a device."""

from contextlib import AbstractContextManager
from typing import NamedTuple

import torch

from ..modules import cpu


class DeviceType(NamedTuple):
    """A type of device; adding one is a row of DEVICE_TYPES."""

    name: str  # torch's
    dlpack: tuple[int, ...]  # DLPack's numbers for it
    backends: tuple[str, ...]  # best first: "auto" takes the first that works


DEVICE_TYPES = (
    DeviceType("cuda", (2, 10), ("cuda", "triton", "reference")),  # 10 is ROCm, torch's "cuda" too
    DeviceType("xpu", (14,), ("triton", "reference")),  # Intel GPUs; never run
    DeviceType("cpu", (1,), ("cpu", "reference")),
)
BY_NAME = {row.name: row for row in DEVICE_TYPES}
_NAMES = {number: row.name for row in DEVICE_TYPES for number in row.dlpack}


def type_name(dlpack: int) -> str:
    """torch's name of a device type, by DLPack's number."""
    return _NAMES.get(dlpack, f"DLPack type {dlpack}")


def device_of(bucket: cpu.Bucket | cpu.GradientBucket) -> torch.device:
    """The device of a bucket's tensors."""
    number, index = bucket.device
    return torch.device(_NAMES[number], index)


def is_available(device_type: str) -> bool:
    """Whether torch finds such a device."""
    return device_type == "cpu" or (
        hasattr(torch, device_type) and torch.get_device_module(device_type).is_available()
    )


def is_capturing(device: torch.device) -> bool:
    """Whether the current stream of `device` captures a graph."""
    if device.type == "cpu":
        return False
    module = torch.get_device_module(device)
    if not (hasattr(module, "is_current_stream_capturing") and module.is_initialized()):
        return False
    if device.index in (None, module.current_device()):
        return module.is_current_stream_capturing()
    with guard(device):
        return module.is_current_stream_capturing()


def guard(device: torch.device) -> AbstractContextManager[None]:
    """A context in which `device` is the current one."""
    return torch.get_device_module(device).device(device)


def stream_key(device: torch.device) -> int:
    """Tells the current stream of `device` from its others."""
    if device.type == "cpu":
        return 0
    return torch.get_device_module(device).current_stream(device).stream_id
