"""From a filled table to memory: the last checks, one launch a bucket, and the new counts."""

from collections.abc import Callable
from typing import Any

import torch

from .backends import resolve

_DEVICE_TYPES = {1: "cpu", 2: "cuda", 10: "cuda"}  # DLPack's numbers; ROCm calls itself cuda


def launch(table, groups: list[dict[str, Any]], backend: str, name: Callable[[int], str]) -> None:
    """Steps every segment of the table and advances the step counts.

    Args:
        table: a filled Table of the module _cpu.
        groups: dicts with RAdam's hyperparameters; the table says which segment obeys which.
        backend: "auto" or a backend's name.
        name: what to call the table's owner number i in an error.

    Raises:
        ValueError: memory that the step writes is used by another segment, or a hyperparameter out
            of range. Nothing is changed.
        RuntimeError: no backend can step tensors on such a device. Nothing is changed.
    """
    if overlap := table.find_overlap():
        owner, stream, other, other_stream = overlap
        raise ValueError(
            f"{stream} of {name(owner)} shares memory with {other_stream} of {name(other)}; "
            "a step writes to it: clone one of them, or leave one out"
        )
    table.scalars(groups)  # complains, if it must, before anything is written
    steps = [
        (resolve(backend, _DEVICE_TYPES.get(b.device[0], "unknown")), b) for b in table.buckets()
    ]
    for step_, bucket in steps:
        step_(bucket, table, groups)
    if owners := table.advance():
        # Autograd must learn of the write: a stale graph raises instead of giving wrong gradients.
        torch.autograd.graph.increment_version(owners)
