"""What a step needs beyond the plain case: parameters, gradients and state that a kernel can't use
as they stand are checked, and given a form that it can use."""

from dataclasses import dataclass
from itertools import combinations_with_replacement
from math import gcd, inf
from typing import Any

import torch
from torch import Tensor

from .flat import is_dense, zeros_like
from .modules import DTYPES, cpu

MOMENTS = ("exp_avg", "exp_avg_sq")

_COMPLEX = {
    torch.float16: torch.complex32,
    torch.float32: torch.complex64,
    torch.float64: torch.complex128,
}
_REAL = {c: r for r, c in _COMPLEX.items()}


@dataclass
class Staged:
    """A parameter in the form that a kernel steps."""

    owner: Tensor  # the user's parameter
    param: Tensor  # dense, local, with memory of its own: the owner, or a view or copy of it
    grad: Tensor  # laid out like param
    copied: bool  # param is a copy: write it back after the step


def stage(owner: Tensor, grad: Tensor, name: object) -> Staged:
    """Checks a parameter and its gradient; views or copies what a kernel can't use as it stands.

    Raises RuntimeError for sparse gradients (as torch does) and ValueError for anything else that
    can't be stepped, calling the parameter `name`.
    """
    if grad.layout != torch.strided or owner.layout != torch.strided:
        raise RuntimeError(
            f"RAdam does not support sparse gradients, got {grad.layout} for {name}; "
            "call to_dense() on it, or use torch.optim.SparseAdam"
        )
    if grad.shape != owner.shape or grad.device != owner.device:
        raise ValueError(
            f"grad of {name}: expected shape {tuple(owner.shape)} on {owner.device}, got "
            f"{tuple(grad.shape)} on {grad.device}"
        )
    dtype = _REAL.get(owner.dtype, owner.dtype)
    if dtype not in DTYPES or grad.is_complex() > owner.is_complex():
        raise ValueError(
            f"{name}: expected float32, bfloat16, float16, float64 or complex, got {owner.dtype} "
            f"with a gradient of {grad.dtype}; cast it, or leave it out"
        )
    param, grad = local(owner), local(grad, like=owner)
    if param.is_meta:
        raise ValueError(
            f"{name}: a meta tensor has no memory; call to_empty() on its module first"
        )
    copied = not is_dense(param) or param.is_conj() or param.is_neg()
    if copied:
        if param.numel() and param.data_ptr() == 0:
            raise ValueError(
                f"{name}: a {type(owner).__name__} has no memory that a kernel can use"
            )
        param = torch.empty_like(param, memory_format=torch.contiguous_format).copy_(param)
    return Staged(owner, param, _fit(grad, param), copied)


def local(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """This rank's part of a DTensor, placed as `like` is; any other tensor as it is."""
    if not hasattr(tensor, "to_local"):
        return tensor
    if like is not None and tensor.placements != like.placements:
        tensor = tensor.redistribute(placements=like.placements)
    return tensor.to_local()


def _fit(grad: Tensor, param: Tensor) -> Tensor:
    """The gradient with the layout of the parameter and a dtype that goes with its own."""
    dtype = grad.dtype
    codes = [cpu.dtype_code(_REAL.get(t, t)) for t in (param.dtype, dtype)]
    if grad.is_complex() != param.is_complex() or not cpu.supported(*codes, codes[0]):
        dtype = moment_dtype(param, None)  # wide enough for any gradient that fits the parameter
    if dtype == grad.dtype and _laid_out_like(grad, param):
        return grad
    return torch.empty_like(param, dtype=dtype).copy_(grad)


def _laid_out_like(tensor: Tensor, param: Tensor) -> bool:
    """Whether a tensor of the parameter's shape has its strides too, and its values in memory."""
    strides = zip(param.shape, param.stride(), tensor.stride(), strict=True)
    same = all(n == 1 or a == b for n, a, b in strides)
    return same and not tensor.is_conj() and not tensor.is_neg()


def find_sharing(params: list[Tensor]) -> tuple[int, int] | None:
    """Where in `params` two lie that share an element, or twice one that shares one with itself.

    The table compares the memory that is stepped, and a parameter that is not dense is stepped as
    a copy. Such parameters may interleave, so only those in reach of each other are looked at.
    """
    spans = []
    for i, param in enumerate(map(local, params)):
        if param.numel():
            last = sum((n - 1) * s for n, s in zip(param.shape, param.stride(), strict=True))
            begin, size = param.data_ptr(), param.element_size()
            spans.append((begin, begin + (last + 1) * size, i))
    near: list[int] = []
    start = end = 0
    for begin, stop, i in [*sorted(spans), (inf, inf, -1)]:
        if begin >= end:
            if pair := _sharing_near([(j, local(params[j])) for j in near], start, end):
                return pair
            near, start = [], begin
        near.append(i)
        end = max(end, stop)
    return None


def _sharing_near(near: list[tuple[int, Tensor]], start: int, end: int) -> tuple[int, int] | None:
    """As find_sharing, of parameters that lie between two addresses: marks their memory."""
    if not near or (len(near) == 1 and _nested(near[0][1])):
        return None
    offsets = [p.data_ptr() - start for _, p in near]
    unit = gcd(*offsets, *(p.element_size() for _, p in near))
    # On the host wherever the parameters are: a GPU would have to be waited for.
    marks = torch.zeros((end - start) // unit, dtype=torch.bool, device="cpu")
    views = []
    for offset, (_, p) in zip(offsets, near, strict=True):
        width = p.element_size() // unit
        strides = (*(width * s for s in p.stride()), 1)
        views.append(marks.as_strided((*p.shape, width), strides, offset // unit).fill_(True))
    if marks.sum() == sum(view.numel() for view in views):
        return None
    for a, b in combinations_with_replacement(range(len(near)), 2):
        marks.zero_()
        views[a].fill_(True)
        if marks.sum() < views[a].numel() if a == b else views[b].any():
            return near[a][0], near[b][0]
    return None


def _nested(param: Tensor) -> bool:
    """Whether each stride steps over all that the smaller ones reach: no element is met twice."""
    reach = 0
    for stride, n in sorted(zip(param.stride(), param.shape, strict=True)):
        if n > 1 and stride <= reach:
            return False
        reach += (n - 1) * stride
    return True


def real(tensor: Tensor) -> Tensor:
    """A complex tensor as pairs of reals, on the same memory; any other as it is."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def moment_dtype(param: Tensor, requested: torch.dtype | None) -> torch.dtype:
    """The dtype of the moments of a parameter, under a group's `state_dtype`."""
    dtype = _REAL.get(param.dtype, param.dtype)
    code = cpu.state_dtype(cpu.dtype_code(dtype), cpu.dtype_code(requested))
    if not param.is_complex():
        return DTYPES[code]
    return _COMPLEX.get(DTYPES[code], torch.complex64)  # there is no complex bfloat16


_STEP_DTYPES = (torch.float32, torch.float64)


def step_device(param: Tensor, group: dict[str, Any]) -> torch.device:
    """Where the step count of a parameter of this group belongs."""
    return local(param).device if group["capturable"] else torch.device("cpu")


def is_step(value: Any, device: torch.device) -> bool:
    """Whether a step count can be used as it stands."""
    return (
        isinstance(value, Tensor)
        and value.numel() == 1
        and value.dtype in _STEP_DTYPES
        and value.device == device
    )


def as_step(value: float | Tensor, device: torch.device) -> Tensor:
    """A step count as torch keeps it: one float32 (or float64) in a tensor."""
    if is_step(value, device):
        return value
    dtype = torch.get_default_dtype()
    dtype = dtype if dtype in _STEP_DTYPES else torch.float32
    # Not torch.tensor, which waits for the copy to a GPU.
    return torch.full((), float(value), dtype=dtype, device=device)


def check_state(state: dict[str, Any], param: Tensor, name: object) -> None:
    """Raises ValueError for a state that can't be this parameter's."""
    if missing := [key for key in ("step", *MOMENTS) if key not in state]:
        raise ValueError(f"state of {name} lacks {missing}; delete all of it to begin anew")
    step = state["step"]
    if isinstance(step, Tensor):
        good = step.numel() == 1 and not step.is_complex()
    else:
        good = isinstance(step, int | float)
    if not good:
        raise ValueError(f"step of {name}: expected a number or one in a tensor, got {step!r}")
    for key in MOMENTS:
        moment = state[key]
        if not isinstance(moment, Tensor) or moment.shape != param.shape:
            what = tuple(moment.shape) if isinstance(moment, Tensor) else type(moment).__name__
            raise ValueError(
                f"{key} of {name}: expected shape {tuple(param.shape)}, got {what}; the parameter "
                "or its state has changed: delete the state to begin anew"
            )
        if moment.is_complex() != param.is_complex() or not (
            moment.is_floating_point() or moment.is_complex()
        ):
            raise ValueError(
                f"{key} of {name}: can't keep moments of {param.dtype} in {moment.dtype}; the "
                "parameter or its state has changed: delete the state to begin anew"
            )


def fits(moment: Tensor, param: Tensor, dtype: torch.dtype) -> bool:
    """Whether a kernel can step a moment as it stands."""
    at_home = moment.dtype == dtype and moment.device == param.device
    return at_home and _laid_out_like(moment, param)


def flat_moments(params: list[Tensor], dtypes: list[torch.dtype]) -> list[dict[str, Tensor]]:
    """New moments, zero, for each parameter; all of one kind, dtype and device in one allocation.

    Args:
        params: the users' parameters.
        dtypes: of each parameter's moments.
    """
    parts = [local(p) for p in params]
    templates = [
        p if is_dense(p) else torch.empty_like(p, memory_format=torch.contiguous_format)
        for p in parts
    ]
    made = [zeros_like(templates, dtypes) for _ in MOMENTS]
    return [
        {key: _like(moment, owner) for key, moment in zip(MOMENTS, moments, strict=True)}
        for owner, *moments in zip(params, *made, strict=True)
    ]


def _like(moment: Tensor, owner: Tensor) -> Tensor:
    """A local moment as a DTensor if its parameter is one."""
    if not hasattr(owner, "to_local"):
        return moment
    return type(owner.data).from_local(
        moment,
        owner.device_mesh,
        owner.placements,
        run_check=False,
        shape=owner.shape,
        stride=owner.stride(),
    )
