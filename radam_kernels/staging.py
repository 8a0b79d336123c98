"""What a step needs beyond the plain case: parameters, gradients and state that a kernel can't use
as they stand are checked, and given a form that it can use."""

from dataclasses import dataclass
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


def stage(owner: Tensor, grad: Tensor, name: str) -> Staged:
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
    copied = not is_dense(param) or param.is_conj() or param.is_neg()
    if copied:
        if any(
            n > 1 and stride == 0 for n, stride in zip(param.shape, param.stride(), strict=True)
        ):
            raise ValueError(
                f"{name}: elements share memory (shape {tuple(param.shape)}, strides "
                f"{param.stride()}); make it contiguous"
            )
        if param.numel() and not param.is_meta and param.data_ptr() == 0:
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
    same_layout = all(
        n == 1 or a == b for n, a, b in zip(param.shape, param.stride(), grad.stride(), strict=True)
    )
    if dtype == grad.dtype and same_layout and not grad.is_conj() and not grad.is_neg():
        return grad
    return torch.empty_like(param, dtype=dtype).copy_(grad)


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


def as_step(value: Any, name: str) -> Tensor:
    """A step count of any kind as torch keeps it: one float32 (or float64) on the CPU."""
    dtypes = (torch.float32, torch.float64)
    if isinstance(value, Tensor):
        if value.numel() == 1 and value.device.type == "cpu" and value.dtype in dtypes:
            return value
        if value.numel() == 1 and not value.is_complex():
            value = value.item()
    if not isinstance(value, int | float):
        raise ValueError(f"step of {name}: expected a number or one in a tensor, got {value!r}")
    dtype = torch.get_default_dtype()
    return torch.tensor(float(value), dtype=dtype if dtype in dtypes else torch.float32)


def check_state(state: dict[str, Any], param: Tensor, name: str) -> None:
    """Raises ValueError for a state that can't be this parameter's."""
    if missing := [key for key in ("step", *MOMENTS) if key not in state]:
        raise ValueError(f"state of {name} lacks {missing}; delete all of it to begin anew")
    as_step(state["step"], name)
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
    return (
        moment.dtype == dtype
        and moment.device == param.device
        and is_dense(moment)
        and not moment.is_conj()
        and not moment.is_neg()
        and all(
            n == 1 or a == b
            for n, a, b in zip(param.shape, param.stride(), moment.stride(), strict=True)
        )
    )


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
