"""From a filled table to memory: the last checks, one launch a bucket, and the new counts."""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.graph import increment_version

from .backends import reference, resolve
from .capture import is_capturing
from .modules import cpu
from .scaling import UNSCALED, Scaling
from .stages import Stages

_DEVICE_TYPES = {1: "cpu", 2: "cuda", 10: "cuda"}  # DLPack's numbers; ROCm calls itself cuda


def launch(
    table,
    groups: list[dict[str, Any]],
    backend: str,
    name: Callable[[int], str],
    scaling: Scaling = UNSCALED,
    stages: Stages | None = None,
) -> None:
    """Steps every segment of the table, advances the step counts and empties the table.

    Args:
        table: a filled Table of the module _cpu.
        groups: dicts with RAdam's hyperparameters; the table says which segment obeys which.
        backend: "auto" or a backend's name.
        name: what to call the table's owner number i in an error.
        scaling: of the gradients of capturable groups.
        stages: to be told of those that begin here: table, update and advance.

    Raises:
        ValueError: memory that the step writes is used by another segment, or a hyperparameter out
            of range. Nothing is changed.
        RuntimeError: no backend can step tensors on such a device, or a CUDA graph is being
            captured that a replay would not do this step with. Nothing is changed.
    """
    if stages:
        stages.enter("table")
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
    capturing = False
    for bucket in buckets:
        device_type = _DEVICE_TYPES.get(bucket.device_type, "unknown")
        steps.append((resolve(backend, device_type, bucket.capturable), device_type, bucket))
        if device_type == "cuda":
            capturing |= is_capturing(torch.device("cuda", bucket.device[1]))
    if capturing:
        _check_capture(steps)
    if stages:
        stages.enter("update")
    for step_, _, bucket in steps:
        step_(bucket, table, groups, scaling)
    if stages:
        stages.enter("advance")
    if owners := table.advance():
        # Autograd must learn of the write: a stale graph raises instead of giving wrong gradients.
        increment_version(owners)


def _check_capture(steps: list[tuple[Callable, str, Any]]) -> None:
    """Raises RuntimeError for steps that a CUDA graph, which is being captured, can't hold."""
    for step_, device_type, bucket in steps:
        if not bucket.capturable:
            reason = "the host counts the steps: construct RAdam with capturable=True"
        elif device_type != "cuda":
            reason = "some parameters are on the CPU: give them an optimizer of their own"
        elif step_ is reference.step_:
            reason = "the reference backend waits for the GPU: use the cuda backend"
        else:
            continue
        raise RuntimeError(f"a CUDA graph is being captured, and replays would not step: {reason}")
