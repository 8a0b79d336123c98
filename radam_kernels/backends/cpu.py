"""The C++ kernel for the CPU: vectorised, on the threads that torch has already."""

import torch

from ..modules import cpu


def why_not(device_type: str) -> str | None:
    return None if device_type == "cpu" else "the C++ kernel steps CPU tensors only"


def step_(bucket, scalars) -> None:
    address, count = scalars.buffer_info()
    cpu.step(
        bucket.segments,
        bucket.count,
        *bucket.dtypes,
        address,
        count // len(cpu.step_scalars_fields),
        torch.get_num_threads(),
    )
