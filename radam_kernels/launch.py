"""From a filled table to memory: the last checks, one launch a bucket, and the new counts."""

from collections.abc import Callable
from typing import Any

from torch.autograd.graph import increment_version

from .backends import resolve
from .modules import cpu

_DEVICE_TYPES = {1: "cpu", 2: "cuda", 10: "cuda"}  # DLPack's numbers; ROCm calls itself cuda


def launch(table, groups: list[dict[str, Any]], backend: str, name: Callable[[int], str]) -> None:
    """Steps every segment of the table, advances the step counts and empties the table.

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
    try:
        buckets = table.prepare(groups)
    except cpu.Overlap as overlap:
        owner, stream, other, other_stream = overlap.args
        if stream == other_stream and name(owner) == name(other):
            raise ValueError(f"{name(owner)} is given twice; leave one out") from None
        raise ValueError(
            f"{stream} of {name(owner)} shares memory with {other_stream} of {name(other)}; "
            "a step writes to it: clone one of them, or leave one out"
        ) from None
    steps = [(resolve(backend, _DEVICE_TYPES.get(b.device_type, "unknown")), b) for b in buckets]
    for step_, bucket in steps:
        step_(bucket, table, groups)
    if owners := table.advance():
        # Autograd must learn of the write: a stale graph raises instead of giving wrong gradients.
        increment_version(owners)
