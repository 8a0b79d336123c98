"""One step of an optimizer: plans it, makes what is missing, and launches it."""

import threading
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .flat import trained_params
from .launch import explain, launch
from .layout import Layout, fits, layout_of, new_tensors
from .modules import cpu
from .repair import Repairs, repair
from .scaling import UNSCALED, Scaling
from .stages import Stages
from .state import is_new

if TYPE_CHECKING:
    from .optimizer import RAdam

_RESERVING = threading.Lock()  # autograd runs the hooks of step_in_backward() in several threads


def take_step(
    optimizer: "RAdam",
    plan: cpu.Plan,
    groups: list[dict[str, Any]],
    state: dict[Tensor, Any],
    stages: Stages | None = None,
    *,
    watched: bool = False,
    trained: bool = False,
    first_ordinal: int = 0,
) -> None:
    """Steps the parameters of `groups` that have a gradient.

    If it fails before memory is written, which `plan.begun` tells, nothing has changed. Once it has
    been written, new state is kept, because it belongs to that. The caller releases the plan.

    Args:
        state: that of these parameters, before the step.
        watched: let the optimizer's Watch look.
        trained: whether other parameters have been stepped since the last step().
        first_ordinal: the place of the first of these parameters among all of the optimizer.
    """
    repairs = Repairs()
    try:
        if _refresh(optimizer, plan, repairs, groups, state, first_ordinal):
            if watched and not optimizer._watch.is_over():
                optimizer._watch.look(groups, trained=trained or bool(plan.owners))
            launch(plan, optimizer._backend, repairs.write_backs, stages)
    except BaseException:
        if not plan.begun:
            repairs.undo(optimizer.state)
        raise


def _refresh(
    optimizer: "RAdam",
    plan: cpu.Plan,
    repairs: Repairs,
    groups: list[dict[str, Any]],
    state: dict[Tensor, Any],
    first_ordinal: int,
) -> bool:
    """Plans the step of `groups`; False if the tensors are fake, so that it is already done.

    `state` is that of these parameters, before the step.
    """
    scaling = _scaling(optimizer)
    if torch._C._len_torch_dispatch_stack():
        from . import fake

        if fake.is_active():
            fake.step(groups, optimizer.state)
            return False
    try:
        # Twice if something is repaired; more often only if another thread changes the state of
        # other parameters meanwhile.
        while pending := plan.refresh(groups, state, repairs.replacements, scaling, first_ordinal):
            from . import fake

            if fake.any_fake([owner for _, owner, _, _ in pending]):
                fake.step(groups, optimizer.state)
                return False
            for _, owner, _, reason in pending:
                if id(owner) in repairs.replacements:
                    raise ValueError(f"{optimizer._name(owner)}: {reason}")
            make_tensors = partial(_new_tensors, optimizer)
            repair(repairs, pending, plan, optimizer.state, optimizer._name, make_tensors)
    except (cpu.Refusal, cpu.InvalidGroup) as error:
        raise explain(error, plan, optimizer._name) from None
    return True


def _scaling(optimizer: "RAdam") -> Scaling:
    """What GradScaler sets on the optimizer for this step, and the factor of clipping."""
    found = optimizer.__dict__
    factor = None
    if clipping := found.get("_clipping"):
        factor = clipping.factor_for(optimizer.param_groups, optimizer._name)
    if "found_inf" not in found and "grad_scale" not in found:
        return UNSCALED if factor is None else Scaling(factor=factor)
    if optimizer._in_backward is not None:
        raise RuntimeError(
            "grad_scale and found_inf are set on the optimizer while step_in_backward() is on, "
            "and come too late for steps in backward: train without GradScaler, or call "
            "remove() on the handle"
        )
    if not optimizer._step_supports_amp_scaling:
        raise RuntimeError(
            "grad_scale and found_inf are set on the optimizer, and only a step with "
            "capturable=True and amp_scaling=True reads them; construct RAdam with both, or "
            "delete them and call GradScaler.unscale_"
        )
    if factor is not None and found.get("grad_scale") is not None:
        raise RuntimeError(
            "clip_grad_norm_ has measured gradients that are still scaled: call "
            "GradScaler.unscale_(optimizer) before it"
        )
    return Scaling(found.get("grad_scale"), found.get("found_inf"), factor)


def _new_tensors(optimizer: "RAdam", fresh: list[tuple[Tensor, Layout]]) -> list[dict[str, Tensor]]:
    """New tensors of zeros for the state of each (parameter, layout)."""
    if not optimizer._flatten:
        return new_tensors([owner for owner, _ in fresh], [layout for _, layout in fresh])
    # One buffer for all parameters that train, including those that have no gradient yet.
    with _RESERVING:
        return _reserve(optimizer, fresh)


def _reserve(optimizer: "RAdam", fresh: list[tuple[Tensor, Layout]]) -> list[dict[str, Tensor]]:
    reserved = optimizer.__dict__.setdefault("_reserved", {})

    def is_reserved(owner: Tensor, layout: Layout) -> bool:
        return owner in reserved and fits(reserved[owner], owner, layout)

    if not all(is_reserved(owner, layout) for owner, layout in fresh):
        wanted = {
            owner: layout_of(owner, group)
            for group in optimizer.param_groups
            for owner in trained_params([group])
            if is_new(optimizer.state.get(owner))
        } | dict(fresh)
        made = new_tensors(list(wanted), list(wanted.values()), flatten=True)
        reserved.clear()
        reserved.update(zip(wanted, made, strict=True))
    return [reserved.pop(owner) for owner, _ in fresh]
