"""Makes state for new parameters, and replacements for tensors that a kernel can't use."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import combinations_with_replacement
from math import gcd
from sys import maxsize
from typing import Any

import torch
from torch import Tensor

from .backends.devices import is_capturing
from .flat import is_dense
from .hyperparameters import refuse_float16
from .layout import (
    COMPLEX,
    EXPONENTS,
    EXTRAS,
    MOMENTS,
    REAL,
    REMAINDER,
    Layout,
    fill,
    fits,
    folded,
    formats_of,
    laid_out_like,
    layout_of,
)
from .modules import DTYPES, cpu
from .sharding import (
    check_local_shape,
    is_sharded,
    local,
    redistributed_gradients,
    same_placement,
    shard_order,
)
from .state import (
    KEYS,
    as_step,
    check_state,
    check_storage,
    is_new,
    is_step,
    placed_tensors,
    step_device,
)

# Makes the tensors of a state for each (parameter, layout).
MakeTensors = Callable[[list[tuple[Tensor, Layout]]], list[dict[str, Tensor]]]

_MISSING = object()  # the parameter is not in the state


@dataclass
class Repairs:
    """What was changed for a step, and how to undo it if the step fails before it writes memory."""

    # By id of the owner: the owner, and what is stepped in its place, in the order of Stream in
    # csrc/host/bucket.h.
    replacements: dict[int, tuple[Tensor | None, ...]] = field(default_factory=dict)
    write_backs: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # (owner, stepped copy)
    before: list[tuple[Tensor, dict[str, Any] | None]] = field(
        default_factory=list
    )  # (owner, old state)

    def undo(self, state: dict[Tensor, Any]) -> None:
        for owner, items in reversed(self.before):
            if items is None:
                state.pop(owner, None)
            elif (own := state.get(owner)) is not None:  # unless another thread has deleted it
                own.clear()
                own.update(items)


@dataclass
class Staged:
    """A parameter in the form that a kernel steps."""

    param: Tensor  # local and dense, with memory of its own: the owner's, or a copy
    grad: Tensor  # laid out like param
    copied: bool  # param is a copy: write it back after the step


class _Name:
    """The name of a parameter in error messages; the lookup is slow, so only made if needed."""

    def __init__(self, owner: Tensor, name_of: Callable[[Tensor], str], of: str = "") -> None:
        self.owner, self.name_of, self.of = owner, name_of, of

    def __str__(self) -> str:
        return f"{self.of}{self.name_of(self.owner)}"


@torch.no_grad()
def repair(
    repairs: Repairs,
    pending: list[tuple[dict[str, Any], Tensor, Tensor, str]],
    plan: cpu.Plan,
    state: dict[Tensor, Any],
    name_of: Callable[[Tensor], str],
    make_tensors: MakeTensors,
) -> None:
    """Makes state or replacements for the parameters that Plan.refresh() returned as pending.

    Validates all of them before it changes any. Raises RuntimeError for sparse gradients (as torch
    does) and during the capture of a CUDA graph, ValueError for anything else that can't be
    stepped.
    """
    owners = [owner for _, owner, _, _ in pending]
    olds: list[dict[str, Any] | None] = []
    for group, owner, grad, _ in pending:
        name = _Name(owner, name_of)
        refuse_float16(owner, group, name_of)
        # A copy, so that other threads can't change it between validation and use.
        old = state.get(owner, _MISSING)
        old = dict(old) if isinstance(old, dict) else old
        if old is not _MISSING:
            check_state(old, owner, name)
        olds.append(None if old is _MISSING else old)
        validate(owner, grad, name)
    grads = redistributed_gradients([grad for _, _, grad, _ in pending], owners)
    placed = [
        placed_tensors(old, owner, _Name(owner, name_of))
        for owner, old in zip(owners, olds, strict=True)
    ]
    staged = [
        _stage(owner, grad, group, tensors.get(REMAINDER), _Name(owner, name_of), new=is_new(old))
        for (group, owner, _, _), grad, old, tensors in zip(
            pending, grads, olds, placed, strict=True
        )
    ]
    if any(item.copied for item in staged):
        refuse_sharing([*plan.owners, *owners], name_of)
    fresh = []
    for (group, owner, _, _), old, tensors in zip(pending, olds, placed, strict=True):
        layout = layout_of(owner, group)
        fitting = fits(tensors, owner, layout)
        if not fitting:
            fresh.append((owner, layout))
        counted = old is not None and fitting and is_step(old["step"], step_device(owner, group))
        counted = counted and (layout.remainder is not None or REMAINDER not in tensors)
        if not counted and is_capturing(local(owner).device):
            raise RuntimeError(
                f"{name_of(owner)} has no state that fits it, and state that is made while a CUDA "
                "graph is captured is reset by each replay: step once before the capture"
            )
    made = {owner: m for (owner, _), m in zip(fresh, make_tensors(fresh), strict=True)}
    for (group, owner, _, _), old, stored, item in zip(pending, olds, placed, staged, strict=True):
        layout = layout_of(owner, group)
        if owner in made:
            fill(made[owner], stored)
        unused = {REMAINDER} if layout.remainder is None else set()
        unused |= set() if layout.block8 else {*EXPONENTS.values()}
        new = {"step": as_step((old or {}).get("step", 0), step_device(owner, group))}
        new |= {k: t for k, t in made.get(owner, stored).items() if k not in unused}
        before = old or {}
        if old is None or any(before.get(key) is not new.get(key) for key in (*KEYS, *EXTRAS)):
            repairs.before.append((owner, old))
            _set_state(state, owner, new)
        moments = (local(new[key]) for key in MOMENTS)
        extras = (None if (extra := new.get(key)) is None else local(extra) for key in EXTRAS)
        repairs.replacements[id(owner)] = (
            owner,
            item.param,
            item.grad,
            *moments,
            new["step"],
            *extras,
        )
        if item.copied:
            repairs.write_backs.append((local(owner), item.param))


def _set_state(state: dict[Tensor, Any], owner: Tensor, new: dict[str, Tensor]) -> None:
    """Puts step and moments first, as torch does: the order that the walk reads fastest."""
    items = state.setdefault(owner, {})
    others = {key: value for key, value in items.items() if key not in (*KEYS, *EXTRAS)}
    items.clear()
    items.update(new)
    items.update(others)


def validate(owner: Tensor, grad: Tensor, name: object) -> None:
    """Raises for a parameter or a gradient that no kernel can step, or that has no memory."""
    if grad.layout != torch.strided or owner.layout != torch.strided:
        raise RuntimeError(
            f"RAdam does not support sparse gradients or nested tensors, got {grad.layout} for "
            f"{name}; call to_dense() on it, or use torch.optim.SparseAdam"
        )
    if grad.shape != owner.shape or grad.device != owner.device:
        raise ValueError(
            f"grad of {name}: expected shape {tuple(owner.shape)} on {owner.device}, got "
            f"{tuple(grad.shape)} on {grad.device}"
        )
    dtype = REAL.get(owner.dtype, owner.dtype)
    if dtype not in DTYPES or grad.is_complex() > owner.is_complex():
        raise ValueError(
            f"{name}: expected float32, bfloat16, float16, float64 or complex, got {owner.dtype} "
            f"with a gradient of {grad.dtype}; cast it, or leave it out"
        )
    _check_gradient_mesh(owner, grad, name)
    if owner.is_meta:
        raise ValueError(
            f"{name}: a meta tensor has no memory; call to_empty() on its module first"
        )
    check_storage(owner, name)
    check_storage(grad, name, "grad of ")
    if same_placement(grad, owner):
        check_local_shape(grad, owner, "grad of ", name)


def _stage(
    owner: Tensor,
    grad: Tensor,
    group: dict[str, Any],
    remainder: Tensor | None,
    name: _Name,
    *,
    new: bool,
) -> Staged:
    """A validated parameter and its gradient, copied where a kernel can't use them directly.

    The gradient is placed as its parameter is. A remainder of a parameter that is float32 now is
    added to the copy.
    """
    if not same_placement(grad, owner):
        raise ValueError(f"grad of {name}: its shards can't be put in the order of its parameter's")
    check_local_shape(grad, owner, "grad of ", name)
    param, grad = local(owner), local(grad)
    copied = not is_dense(param) or param.is_conj() or param.is_neg()
    if copied:
        param = _copy(param, name, try_back=new)
    if remainder is not None and param.dtype == torch.float32:
        param, copied = folded(param, local(remainder).to(param.device)), True
    return Staged(param, _match_gradient(grad, param, *formats_of(owner, group)), copied)


def _check_gradient_mesh(owner: Tensor, grad: Tensor, name: object) -> None:
    if not is_sharded(owner):
        if is_sharded(grad):
            raise ValueError(
                f"grad of {name}: it is a DTensor and its parameter is a plain tensor; call "
                "full_tensor() on the gradient, or distribute the parameter"
            )
        return
    if not is_sharded(grad) or grad.device_mesh != owner.device_mesh:
        where = grad.device_mesh if is_sharded(grad) else "a plain tensor"
        raise ValueError(
            f"grad of {name}: expected a DTensor on {owner.device_mesh}, got {where}; make it one "
            "with torch.distributed.tensor.distribute_tensor"
        )
    if grad.placements == owner.placements and shard_order(grad) != shard_order(owner):
        raise ValueError(
            f"grad of {name}: its shards are ordered {shard_order(grad)}, those of the parameter "
            f"{shard_order(owner)}; redistribute it"
        )


def _copy(param: Tensor, name: _Name, *, try_back: bool) -> Tensor:
    """A plain, contiguous copy. Some classes lack empty_like.

    Args:
        try_back: check that a class without memory of its own (such as a quantized weight) can be
            copied back to, before anything is changed.
    """
    try:
        copy = torch.empty(param.shape, dtype=param.dtype, device=param.device).copy_(param)
        if try_back and type(param) not in (Tensor, torch.nn.Parameter):
            param.detach().clone().copy_(copy)
    except (NotImplementedError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"{name}: a {type(param).__name__} has no memory that a kernel can use, and can't be "
            f"copied to a plain tensor and back ({error}); train a plain copy and convert that"
        ) from error
    return copy


def _match_gradient(grad: Tensor, param: Tensor, weight: int, moments: int) -> Tensor:
    """The gradient, copied if its layout differs from the parameter's or its dtype can't be mixed
    with those of the parameter and its moments, whose codes are given."""
    dtype = grad.dtype
    of_grad = cpu.dtype_code(REAL.get(dtype, dtype))
    if grad.is_complex() != param.is_complex() or not cpu.supported(weight, of_grad, moments):
        wide = REAL.get(param.dtype, param.dtype) == torch.float64
        dtype = torch.float64 if wide else torch.float32
        dtype = COMPLEX[dtype] if param.is_complex() else dtype
    if dtype == grad.dtype and laid_out_like(grad, param):
        return grad
    return torch.empty_like(param, dtype=dtype).copy_(grad)


def refuse_sharing(params: list[Tensor], name_of: Callable[[Tensor], str]) -> None:
    """Raises ValueError for parameters that share memory, with each other or within one."""
    if pair := find_sharing(params):
        name, other = (name_of(params[i]) for i in pair)
        raise ValueError(
            f"{name} shares memory with {'itself' if name == other else other}, and a step "
            "writes to it: clone one of them, make it contiguous, or leave one out"
        )


def find_sharing(params: list[Tensor]) -> tuple[int, int] | None:
    """Indices of two parameters that share an element, or twice the index of one that overlaps
    itself.

    The plan compares the memory that is stepped, but a parameter that is not dense is stepped as a
    copy. Such parameters may interleave without overlap, so their elements must be compared. That
    is done within clusters of parameters whose address ranges overlap.
    """
    spans = []
    for i, param in enumerate(map(local, params)):
        if param.numel() and param.data_ptr():  # some classes have no memory
            last = sum((n - 1) * s for n, s in zip(param.shape, param.stride(), strict=True))
            begin, size = param.data_ptr(), param.element_size()
            spans.append((begin, begin + (last + 1) * size, i))
    cluster: list[int] = []
    start = end = 0
    for begin, stop, i in [*sorted(spans), (maxsize, maxsize, -1)]:
        if begin >= end:
            if pair := _sharing_in_cluster([(j, local(params[j])) for j in cluster], start, end):
                return pair
            cluster, start = [], begin
        cluster.append(i)
        end = max(end, stop)
    return None


def _sharing_in_cluster(
    cluster: list[tuple[int, Tensor]], start: int, end: int
) -> tuple[int, int] | None:
    """As find_sharing, for parameters between two addresses: marks the bytes that each uses."""
    if not cluster or (len(cluster) == 1 and _has_distinct_elements(cluster[0][1])):
        return None
    offsets = [p.data_ptr() - start for _, p in cluster]
    unit = gcd(*offsets, *(p.element_size() for _, p in cluster))
    # On the host wherever the parameters are, because reading a result would synchronize a GPU.
    marks = torch.zeros((end - start) // unit, dtype=torch.bool, device="cpu")
    views = []
    for offset, (_, p) in zip(offsets, cluster, strict=True):
        width = p.element_size() // unit
        strides = (*(width * s for s in p.stride()), 1)
        views.append(marks.as_strided((*p.shape, width), strides, offset // unit).fill_(True))
    if marks.sum() == sum(view.numel() for view in views):
        return None
    for a, b in combinations_with_replacement(range(len(cluster)), 2):
        marks.zero_()
        views[a].fill_(True)
        if marks.sum() < views[a].numel() if a == b else views[b].any():
            return cluster[a][0], cluster[b][0]
    return None


def _has_distinct_elements(param: Tensor) -> bool:
    """Whether each stride exceeds the span of all smaller ones, so that no two indices share an
    element."""
    reach = 0
    for stride, n in sorted(zip(param.stride(), param.shape, strict=True)):
        if n > 1 and stride <= reach:
            return False
        reach += (n - 1) * stride
    return True
