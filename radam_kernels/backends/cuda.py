"""The handwritten CUDA kernel: 16-byte accesses, any number of tensors in one launch."""

from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..modules import cpu, load_optional
from ..scaling import address
from ..schedule import StepScalars
from .devices import device_of, is_capturing
from .upload import DeviceTables, tables_of

if TYPE_CHECKING:
    from .. import _cuda
else:
    _cuda = load_optional("_cuda")
NOT_BUILT = {
    "off": "RADAM_CUDA=0 was set when radam_kernels was installed; install it again without",
    "no nvcc": "there was no nvcc when radam_kernels was installed; put CUDA's compiler on the "
    "PATH and install it again",
    "yes": "the module _cuda is gone; install radam_kernels again",
}


def why_not(device_type: str) -> str | None:
    if device_type != "cuda":
        return "the CUDA kernel steps CUDA tensors only"
    if torch.version.hip:
        return "this torch is for ROCm; the Triton kernel runs there"
    if not torch.version.cuda:
        return f"this torch ({torch.__version__}) was built without CUDA"
    if _cuda is None:
        return f"not built: {NOT_BUILT[cpu.cuda_built]}"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device (torch.cuda.is_available() is False)"
    if reason := old_driver(_cuda):
        return reason
    if reason := _cuda.why_not(torch.cuda.current_device()):
        return f"{reason} (built for {_cuda.architectures}; RADAM_CUDA_ARCHS chooses)"
    return None


def old_driver(module: ModuleType) -> str | None:
    """Why the driver can't run what `module` was built with; None if it can, or if there is none.

    A driver runs what any toolkit of its own major version built, or of an older one.
    """
    runtime, driver = module.runtime_version(), module.driver_version()
    if not driver or driver // 1000 >= runtime // 1000:
        return None
    return (
        f"the driver is for CUDA {dotted(driver)} and _cuda was built with CUDA {dotted(runtime)}: "
        f"update the driver, or build radam_kernels with CUDA {driver // 1000}"
    )


def dotted(version: int) -> str:
    """CUDA's number of a version, as people write it: 12.9 for 12090."""
    return f"{version // 1000}.{version % 1000 // 10}"


def run(bucket: cpu.Bucket) -> None:
    device = device_of(bucket)
    launch_(_cuda, bucket, device, torch.cuda.current_stream(device).cuda_stream)


def launch_(module: ModuleType, bucket: cpu.Bucket, device: torch.device, stream: int) -> None:
    """Advances the counts where they are on the device, and steps; `module` has the kernels."""

    tables = _tables(module, bucket, device, stream)
    segments, grads, low_memory, work = tables.segments(bucket, module.chunk(*bucket.dtypes))
    scalars, count, rows = 0, 0, None
    if bucket.capturable:
        rows = advance(module, bucket, tables, device, stream)
    else:
        scalars, count = bucket.scalars
        if count > module.inline_scalars:
            rows = tables.rows("scalars", bucket.scalar_rows)
    factor = bucket.scaling.on(device).factor
    module.step(
        segments.data_ptr(),
        grads.data_ptr(),
        address(low_memory),
        work.data_ptr(),
        tables.run,
        tables.blocks,
        *bucket.dtypes,
        scalars,
        count,
        address(rows),
        address(factor),
        device.index,
        stream,
    )


def _tables(
    module: ModuleType,
    bucket: cpu.Bucket | cpu.GradientBucket,
    device: torch.device,
    stream: int,
) -> DeviceTables:
    def upload(rows: bytes) -> Tensor:
        # Not from pinned memory: arguments of launches need no event to guard them.
        room = torch.empty(len(rows) // 8, dtype=torch.int64, device=device)
        module.upload(room.data_ptr(), rows, device.index, stream)
        return room

    return tables_of(bucket, stream, upload, keep=not is_capturing(device))


def advance(
    module: ModuleType,
    bucket: cpu.Bucket,
    tables: DeviceTables,
    device: torch.device,
    stream: int,
) -> Tensor:
    """Advances the counts; returns float64 rows of StepScalars, one a segment, without waiting."""
    counters = tables.rows("counters", bucket.counter_rows)
    hyperparameters = tables.rows("hyperparameters", bucket.hyperparameter_rows)
    rows = torch.empty((bucket.count, len(StepScalars._fields)), dtype=torch.float64, device=device)
    scaling = bucket.scaling.on(device)
    module.advance(
        counters.data_ptr(),
        bucket.count,
        hyperparameters.data_ptr(),
        rows.data_ptr(),
        address(scaling.grad_scale),
        address(scaling.found_inf),
        device.index,
        stream,
    )
    return rows


def power_sum(bucket: cpu.GradientBucket, norm_type: float) -> Tensor:
    device = device_of(bucket)
    stream = torch.cuda.current_stream(device).cuda_stream
    return power_sum_(_cuda, bucket, norm_type, device, stream)


def power_sum_(
    module: ModuleType,
    bucket: cpu.GradientBucket,
    norm_type: float,
    device: torch.device,
    stream: int,
) -> Tensor:
    tables = _tables(module, bucket, device, stream)
    grads, work = tables.gradients(bucket, module.norm_chunk(bucket.dtype))
    partials = torch.empty(tables.blocks, dtype=torch.float64, device=device)
    result = torch.empty((), dtype=torch.float64, device=device)
    module.power_sum(
        grads.data_ptr(),
        work.data_ptr(),
        tables.run,
        tables.blocks,
        bucket.dtype,
        norm_type,
        partials.data_ptr(),
        result.data_ptr(),
        device.index,
        stream,
    )
    return result
