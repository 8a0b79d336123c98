"""The handwritten CUDA kernel: 16-byte accesses, any number of tensors in one launch."""

import torch

from ..modules import load_optional
from .device_tables import device_tables, refuse_capture, scalars_rows, upload

_cuda = load_optional("_cuda")


def why_not(device_type: str) -> str | None:
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


def step_(bucket, table, groups) -> None:
    device = torch.device("cuda", bucket.device[1])
    stream = torch.cuda.current_stream(device)
    refuse_capture()
    with torch.cuda.device(device):
        tables = device_tables(
            bucket, table, _cuda.chunk(*bucket.dtypes), device, stream.cuda_stream
        )
        address, count = table.scalars(groups)
        inline = count <= _cuda.inline_scalars
        rows = None if inline else upload(scalars_rows(address, count), device)
        _cuda.step(
            tables.segments.data_ptr(),
            tables.work.data_ptr(),
            len(tables.work),
            *bucket.dtypes,
            address,
            count,
            0 if rows is None else rows.data_ptr(),
            device.index,
            stream.cuda_stream,
        )
