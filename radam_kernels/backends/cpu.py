"""The C++ kernel for the CPU: vectorised, on the threads that torch has already."""

import torch


def why_not(device_type: str, capturable: bool = False) -> str | None:
    return None if device_type == "cpu" else "the C++ kernel steps CPU tensors only"


def step_(bucket, table, groups, scaling) -> None:
    if bucket.capturable:
        bucket.advance(*scaling.numbers())
    bucket.step(table, groups, torch.get_num_threads())
