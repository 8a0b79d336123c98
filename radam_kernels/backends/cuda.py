"""The handwritten CUDA kernel: 16-byte accesses, any number of tensors in one launch."""

import torch
from torch import Tensor

from ..capture import is_capturing
from ..modules import load_optional
from ..schedule import StepScalars
from .device_tables import DeviceTables, device_tables

_cuda = load_optional("_cuda")


def why_not(device_type: str, capturable: bool = False) -> str | None:
    if device_type != "cuda":
        return "the CUDA kernel steps CUDA tensors only"
    if _cuda is None:
        return "built without nvcc: put CUDA's compiler on the PATH and install radam_kernels again"
    if torch.version.hip:
        return "this torch is for ROCm; the Triton kernel runs there"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device (torch.cuda.is_available() is False)"
    if reason := _cuda.why_not(torch.cuda.current_device()):
        return f"{reason} (built for {_cuda.architectures}; RADAM_CUDA_ARCHS chooses)"
    return None


def step_(bucket, table, groups, scaling) -> None:
    device = torch.device("cuda", bucket.device[1])
    stream = torch.cuda.current_stream(device).cuda_stream
    launch_(_cuda, bucket, table, groups, scaling.on(device), device, stream)


def launch_(module, bucket, table, groups, scaling, device: torch.device, stream: int) -> None:
    """Advances the counts where they are on the device, and steps; `module` has the kernels."""
    tables = tables_of(module, bucket, table, device, stream)
    segments = bucket.segment_rows
    at = tables.rows("segments", segments), tables.work(segments, module.chunk(*bucket.dtypes))
    address, count, rows = 0, 0, None
    if bucket.capturable:
        rows = advance(module, bucket, tables, scaling, device, stream)
    else:
        address, count = table.scalars(groups)
        if count > module.inline_scalars:
            rows = tables.rows("scalars", table.scalar_rows(groups))
    module.step(
        *(tensor.data_ptr() for tensor in at),
        tables.run,
        tables.blocks,
        *bucket.dtypes,
        address,
        count,
        0 if rows is None else rows.data_ptr(),
        device.index,
        stream,
    )


def tables_of(module, bucket, table, device: torch.device, stream: int) -> DeviceTables:
    """The bucket's tables on the device; a graph that is being captured gets its own."""

    def upload(rows: bytes) -> Tensor:
        # Not from pinned memory: arguments of launches need no event to guard them.
        room = torch.empty(len(rows) // 8, dtype=torch.int64, device=device)
        module.upload(room.data_ptr(), rows, device.index, stream)
        return room

    # Where the host counts, launch() has asked already.
    keep = not (bucket.capturable and is_capturing(device))
    return device_tables(bucket, table, stream, upload, keep=keep)


def advance(
    module, bucket, tables: DeviceTables, scaling, device: torch.device, stream: int
) -> Tensor:
    """Moves the counts on; returns float64 [segments, 9], rows of StepScalars, without waiting."""
    counters = tables.rows("counters", bucket.counter_rows)
    hyperparameters = tables.rows("hyperparameters", bucket.hyperparameter_rows)
    rows = torch.empty((bucket.count, len(StepScalars._fields)), dtype=torch.float64, device=device)
    module.advance(
        counters.data_ptr(),
        bucket.count,
        hyperparameters.data_ptr(),
        rows.data_ptr(),
        *scaling.addresses(),
        device.index,
        stream,
    )
    return rows
