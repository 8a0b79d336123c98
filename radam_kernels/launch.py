"""Runs a plan: a backend for each bucket, one launch each, and the step counts."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .backends import Backend, BackendChoice, devices, reference, resolve
from .backends import cpu as cpu_backend
from .hyperparameters import DEFAULTS, check
from .interrupts import deferred_interrupts
from .modules import cpu
from .schedule import group_scalars
from .stages import Stages


def launch(
    plan: cpu.Plan,
    backend: BackendChoice,
    write_backs: Iterable[tuple[Tensor, Tensor]] = (),
    stages: Stages | None = None,
) -> None:
    """Steps every bucket of a plan, and writes the step counts.

    No Ctrl-C comes between the first write and the last: where the CPU kernel does all of it, that
    is one call, and elsewhere SIGINT is deferred.

    Args:
        plan: refreshed, with nothing pending.
        backend: "auto" or a backend's name.
        write_backs: (parameter, copy of it that is stepped): copied back after the step.
        stages: told of the stage "update".

    Raises:
        RuntimeError: no backend can step tensors on such a device, or a CUDA graph is being
            captured that a replay would not do this step with. Nothing is changed.
    """
    # No object for each bucket: that is half of the overhead for a single parameter.
    if plan.on_cpu and not write_backs and resolve(backend, "cpu") is cpu_backend:
        if stages:
            stages.enter("update")
        plan.run_cpu(torch.get_num_threads())
        return
    steps = []
    capturing = False
    for bucket in plan.buckets:
        device_type = devices.type_name(bucket.device[0])
        steps.append((resolve(backend, device_type), bucket))
        if device_type != "cpu":
            capturing |= devices.is_capturing(devices.device_of(bucket))
    if capturing:
        _check_capture(steps)
    if stages:
        stages.enter("update")
    with deferred_interrupts():
        plan.begin()
        for module, bucket in steps:
            module.run(bucket)
        plan.commit()
        if write_backs:
            with torch.no_grad():
                for owner, param in write_backs:
                    owner.copy_(param)


def _check_capture(steps: list[tuple[Backend, cpu.Bucket]]) -> None:
    """Raises RuntimeError for steps that a CUDA graph, which is being captured, can't hold."""
    for module, bucket in steps:
        if not bucket.capturable:
            reason = "the host counts the steps: construct RAdam with capturable=True"
        elif bucket.device[0] == 1:
            reason = "some parameters are on the CPU: give them an optimizer of their own"
        elif module is reference:
            reason = "the reference backend waits for the GPU: use the cuda or triton backend"
        else:
            continue
        raise RuntimeError(f"a CUDA graph is being captured, and replays would not step: {reason}")


def explain(
    error: cpu.Refusal | cpu.InvalidGroup, plan: cpu.Plan, name_of: Callable[[Tensor], str]
) -> Exception:
    """What to raise for a Refusal or InvalidGroup of a plan: the same, with names."""
    if isinstance(error, cpu.Refusal):
        message, indices = error.args
        owners = plan.owners
        return ValueError(message.format(*(name_of(owners[i]) for i in indices)))
    group, step = error.args
    try:
        group_scalars(plan.groups[group], step)
    except Exception as reason:
        return reason
    if step > 2**53:
        return ValueError(f"step: expected a whole number up to 2**53, got {step!r}")
    try:
        check({**DEFAULTS, **plan.groups[group]})
    except (ValueError, NotImplementedError) as reason:
        return reason
    return ValueError(f"param_groups[{group}]: hyperparameters that no kernel takes")
