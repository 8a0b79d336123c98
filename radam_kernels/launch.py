"""From a filled table to memory: the last checks, one launch a bucket, and the new counts."""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.graph import increment_version

from .backends import resolve
from .capture import is_capturing
from .modules import cpu
from .scaling import UNSCALED, Scaling

_DEVICE_TYPES = {1: "cpu", 2: "cuda", 10: "cuda"}  # DLPack's numbers; ROCm calls itself cuda


def launch(
    table,
    groups: list[dict[str, Any]],
    backend: str,
    name: Callable[[int], str],
    scaling: Scaling = UNSCALED,
) -> None:
    """Steps every segment of the table, advances the step counts and empties the table.

    Args:
        table: a filled Table of the module _cpu.
        groups: dicts with RAdam's hyperparameters; the table says which segment obeys which.
        backend: "auto" or a backend's name.
        name: what to call the table's owner number i in an error.
        scaling: of the gradients of capturable groups.

    Raises:
        ValueError: memory that the step writes is used by another segment, or a hyperparameter out
            of range. Nothing is changed.
        RuntimeError: no backend can step tensors on such a device, or a CUDA graph is being
            captured and the host counts the steps. Nothing is changed.
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
    steps = []
    for bucket in buckets:
        device_type = _DEVICE_TYPES.get(bucket.device_type, "unknown")
        host_counts = device_type == "cuda" and not bucket.capturable
        if host_counts and is_capturing(torch.device("cuda", bucket.device[1])):
            raise RuntimeError(
                "a CUDA graph is being captured and the host counts the steps, so that replays "
                "would not: construct RAdam with capturable=True"
            )
        steps.append((resolve(backend, device_type, bucket.capturable), bucket))
    for step_, bucket in steps:
        step_(bucket, table, groups, scaling)
    if owners := table.advance():
        # Autograd must learn of the write: a stale graph raises instead of giving wrong gradients.
        increment_version(owners)
