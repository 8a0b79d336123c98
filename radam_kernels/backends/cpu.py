"""The C++ kernel for the CPU: vectorized, on torch's thread pool."""

import torch

from ..modules import cpu


def why_not(device_type: str) -> str | None:
    return None if device_type == "cpu" else "the C++ kernel steps CPU tensors only"


def run(bucket: cpu.Bucket) -> None:
    bucket.run(torch.get_num_threads())
