"""The Triton kernel: NVIDIA, AMD and Intel GPUs, and any machine under TRITON_INTERPRET=1."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor

from ..modules import cpu
from . import devices
from .advance import advance
from .upload import DeviceTables, tables_of, upload_pinned

_INTERPRETER = "TRITON_INTERPRET=1, set before Python starts, runs the kernel on the CPU, slowly"

# run() is called only where why_not() returns None, so what is imported here is there.
# pyright: reportPossiblyUnboundVariable=false
try:
    import triton

    from . import triton_kernel
    from .triton_kernel import INTERPRETED, launch_, launch_power_sum, upload_by_arguments
except ImportError as _error:
    INTERPRETED = COMPILES_EXACTLY = False
    _missing: str | None = f"Triton can't be imported ({_error}); pip install triton"
else:
    _missing = None
    COMPILES_EXACTLY = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 6)


def why_not(device_type: str) -> str | None:
    if _missing:
        return _missing
    if not COMPILES_EXACTLY:
        return (
            f"Triton {triton.__version__} compiles division and square root so that subnormals are "
            "flushed to zero, and its interpreter is too old as well; 3.6 and later work"
        )
    if INTERPRETED:
        return None if device_type == "cpu" else "TRITON_INTERPRET=1: only CPU tensors are stepped"
    if device_type == "cpu":
        return f"Triton steps GPU tensors only; {_INTERPRETER}"
    if not devices.is_available(device_type):
        return f"torch finds no {device_type} device; {_INTERPRETER}"
    return None


@cache
def _load_upload(device: torch.device) -> None:
    """Compiles and loads what only captures launch: while one lasts, CUDA may refuse to load it."""
    upload_by_arguments(device)(bytes(8))


def _tables(bucket: cpu.Bucket | cpu.GradientBucket, device: torch.device) -> DeviceTables:
    capturing = devices.is_capturing(device)
    # Pinned memory would have to outlive the graph; arguments of launches are part of it.
    upload = (upload_by_arguments if capturing else upload_pinned)(device)
    return tables_of(bucket, devices.stream_key(device), upload, keep=not capturing)


def _guard(device: torch.device) -> AbstractContextManager[object]:
    return nullcontext() if device.type == "cpu" else devices.guard(device)


def run(bucket: cpu.Bucket) -> None:
    device = devices.device_of(bucket)
    with _guard(device):
        if bucket.capturable and not devices.is_capturing(device):
            _load_upload(device)
        tables = _tables(bucket, device)
        segments, grads, low_memory, work = tables.segments(bucket, triton_kernel.CHUNK)
        if bucket.capturable:
            scalars = advance(bucket).contiguous()
        else:
            scalars = tables.rows("scalars", bucket.scalar_rows)
        factor = bucket.scaling.on(device).factor
        launch_(
            segments, grads, work, scalars, factor, tables.run, tables.blocks, bucket.dtypes,
            low_memory,
        )  # fmt: skip


def power_sum(bucket: cpu.GradientBucket, norm_type: float) -> Tensor:
    device = devices.device_of(bucket)
    with _guard(device):
        tables = _tables(bucket, device)
        grads, work = tables.gradients(bucket, triton_kernel.norm_chunk(bucket.dtype))
        return launch_power_sum(grads, work, tables.run, tables.blocks, bucket.dtype, norm_type)
