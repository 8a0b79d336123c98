"""A parameter's state: `step`, `exp_avg` and `exp_avg_sq`, in the format of torch.optim.RAdam."""

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.optim import Optimizer

from .flat import is_dense, zeros_like
from .modules import DTYPES, cpu
from .sharding import (
    check_local_shape,
    is_sharded,
    local,
    redistributed,
    same_placement,
    wrap_local,
)

MOMENTS = ("exp_avg", "exp_avg_sq")
KEYS = ("step", *MOMENTS)

COMPLEX = {
    torch.float16: torch.complex32,
    torch.float32: torch.complex64,
    torch.float64: torch.complex128,
}
REAL = {c: r for r, c in COMPLEX.items()}
_STEP_DTYPES = (torch.float32, torch.float64)


def moment_dtype(param: Tensor, requested: torch.dtype | None) -> torch.dtype:
    """The dtype of the moments of a parameter, under a group's `state_dtype`."""
    dtype = REAL.get(param.dtype, param.dtype)
    _, code = cpu.formats_of(
        cpu.dtype_code(dtype), param.is_complex(), cpu.dtype_code(requested), 0, False
    )
    return COMPLEX[DTYPES[code]] if param.is_complex() else DTYPES[code]


def step_device(param: Tensor, group: dict[str, Any]) -> torch.device:
    """The device of the step count of a parameter in this group."""
    return local(param).device if group["capturable"] else torch.device("cpu")


def is_step(value: Any, device: torch.device) -> TypeGuard[Tensor]:
    """Whether a step count can be used without a copy."""
    return (
        isinstance(value, Tensor)
        and is_dense(value)
        and value.numel() == 1
        and value.dtype in _STEP_DTYPES
        and value.device == device
    )


def as_step(value: float | Tensor, device: torch.device) -> Tensor:
    """A step count in torch's format: a float32 or float64 tensor of one element."""
    value = value.full_tensor() if is_sharded(value) else value
    if is_step(value, device):
        return value
    dtype = torch.get_default_dtype()
    dtype = dtype if dtype in _STEP_DTYPES else torch.float32
    # torch.tensor would synchronize with a GPU.
    return torch.full((), float(value), dtype=dtype, device=device)


def is_new(state: dict[str, Any] | None) -> bool:
    """Whether a parameter has no state of this optimizer. Other keys are a wrapper's, and kept."""
    return state is None or not any(key in state for key in KEYS)


def check_state(state: Any, param: Tensor, name: object) -> None:
    """Validates a parameter's state; raises ValueError if it can't belong to the parameter."""
    if not isinstance(state, dict):
        raise ValueError(
            f"state of {name}: expected a dict, got {state!r}; delete it to start from zero"
        )
    if is_new(state):
        return
    if missing := [key for key in KEYS if key not in state]:
        raise ValueError(
            f"state of {name} lacks {missing}; delete {[k for k in KEYS if k in state]} from it to "
            "start from zero"
        )
    step = state["step"]
    if isinstance(step, Tensor):
        good = step.layout == torch.strided and step.numel() == 1
        good = good and not step.is_complex() and not step.is_meta
    else:
        # Not every integer above 2**53 is a float, and some are too large for any float.
        good = isinstance(step, Real) and not (
            isinstance(step, Integral) and abs(int(step)) > 2**53
        )
    if not good:
        raise ValueError(
            f"step of {name}: expected a number or one in a tensor, got {_short(step)}"
        )
    if isinstance(step, Tensor):
        check_storage(step, name, "step of ")
    for key in MOMENTS:
        if problem := _moment_problem(state[key], param):
            raise ValueError(
                f"{key} of {name}: {problem}; the parameter or its state has changed: delete the "
                "state to start from zero"
            )
        check_storage(state[key], name, f"{key} of ")
        if same_placement(state[key], param):
            check_local_shape(state[key], param, f"{key} of ", name)


def _moment_problem(moment: Any, param: Tensor) -> str | None:
    """Why a value can't be a moment of a parameter; None if it can."""
    if not isinstance(moment, Tensor) or moment.shape != param.shape:
        got = tuple(moment.shape) if isinstance(moment, Tensor) else type(moment).__name__
        return f"expected shape {tuple(param.shape)}, got {got}"
    if moment.is_complex() != param.is_complex() or not (
        moment.is_floating_point() or moment.is_complex()
    ):
        return f"can't keep moments of {param.dtype} in {moment.dtype}"
    if moment.layout != torch.strided or (moment.is_meta and not param.is_meta):
        kind = "meta" if moment.is_meta else moment.layout
        return f"expected a dense tensor with memory, got {kind}"
    return None


def check_storage(tensor: Tensor, name: object, of: str = "") -> None:
    """Raises ValueError, about `of` and `name`, for a tensor whose storage was freed or shrunk."""
    plain = local(tensor)
    if type(plain) not in (Tensor, torch.nn.Parameter) or plain.is_meta or not plain.numel():
        return
    if plain._is_zerotensor():  # needs no memory
        return
    last = sum((n - 1) * s for n, s in zip(plain.shape, plain.stride(), strict=True))
    needed = (plain.storage_offset() + last + 1) * plain.element_size()
    if (found := plain.untyped_storage().nbytes()) < needed:
        raise ValueError(
            f"{of}{name}: its storage has {found} bytes and the tensor needs {needed}; "
            "untyped_storage().resize_() freed or shrank it: resize it back before the step"
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:40]}... ({type(value).__name__})"


def laid_out_like(tensor: Tensor, param: Tensor) -> bool:
    """Whether a tensor of the parameter's shape has its strides, and is no lazily negated or
    conjugated view."""
    strides = zip(param.shape, param.stride(), tensor.stride(), strict=True)
    same = all(n == 1 or a == b for n, a, b in strides)
    return same and is_dense(tensor) and not tensor.is_conj() and not tensor.is_neg()


def template(param: Tensor) -> Tensor:
    """A tensor with the layout that is stepped: a local parameter's, or that of a contiguous copy
    if it is not dense."""
    return param if is_dense(param) else torch.empty(param.shape, device="meta")


def fits(moment: Tensor, owner: Tensor, dtype: torch.dtype) -> bool:
    """Whether a kernel can step this moment of a parameter without a copy."""
    if not same_placement(moment, owner):
        return False
    moment, param = local(moment), local(owner)
    return (
        moment.dtype == dtype
        and moment.device == param.device
        and moment.shape == param.shape
        and laid_out_like(moment, template(param))
    )


def new_moments(
    params: Sequence[Tensor], dtypes: Sequence[torch.dtype], *, flatten: bool = False
) -> list[dict[str, Tensor]]:
    """New moments of zeros for each parameter.

    Args:
        params: the parameters as the user has them (DTensors, for example).
        dtypes: the dtype of each parameter's moments.
        flatten: allocate one buffer for each key, dtype and device, and return views into these.
    """
    templates = [template(local(p)) for p in params]
    devices = [local(p).device for p in params]

    def zeros() -> list[Tensor]:
        if flatten:
            return zeros_like(templates, dtypes, devices)
        kinds = zip(templates, dtypes, devices, strict=True)
        return [torch.zeros_like(t, dtype=dtype, device=device) for t, dtype, device in kinds]

    made = [zeros() for _ in MOMENTS]
    return [
        {key: wrap_local(moment, owner) for key, moment in zip(MOMENTS, moments, strict=True)}
        for owner, *moments in zip(params, *made, strict=True)
    ]


class Loaded:
    """Wraps a value so that Optimizer.load_state_dict does not cast it."""

    def __init__(self, value: Any) -> None:
        self.value = value


@torch.no_grad()
def prepare_load(optimizer: Optimizer, state_dict: dict[str, Any], flatten: bool) -> dict[str, Any]:
    """Validates a state dict against the parameters and converts it, before anything is changed.

    A loaded moment that fits its parameter is used without a copy, as in torch; step counts are
    copied. Values are returned wrapped in Loaded.
    """
    states = dict(state_dict["state"])
    _refuse_other_optimizers(states)
    loaded = []
    # Not strict: torch checks lengths after the hooks.
    for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=False):
        for key, owner in zip(saved["params"], group["params"], strict=False):
            if key not in states:
                continue
            check_state(states[key], owner, f"param {key}")
            if not is_new(states[key]):
                states[key] = dict(states[key])
                loaded.append((key, owner, {**group, **saved}, saved.get("state_dtype")))
    ours, converted = [], []
    for key, owner, options, state_dtype in loaded:
        state = states[key]
        ours.append(state)
        step = as_step(state["step"], step_device(owner, options))
        state["step"] = step.clone() if step is state["step"] else step
        for k in MOMENTS:
            moment = redistributed(state[k], owner, f"{k} of param {key}")
            state[k] = wrap_local(local(moment), owner)
        dtype = moment_dtype(owner, state_dtype)
        if flatten or not all(fits(state[k], owner, dtype) for k in MOMENTS):
            converted.append((owner, dtype, state))
    made = new_moments([c[0] for c in converted], [c[1] for c in converted], flatten=flatten)
    for (_, _, state), moments in zip(converted, made, strict=True):
        for key, moment in moments.items():
            local(moment).copy_(local(state[key]))
        state.update(moments)
    for state in ours:
        state.update({key: Loaded(state[key]) for key in KEYS})
    return {**state_dict, "state": states}


# Keys of torch's optimizers that have neither exp_avg nor exp_avg_sq.
_OTHERS = {"momentum_buffer", "sum", "square_avg", "acc_delta", "prev", "ax", "d", "prev_loss"}


def _refuse_other_optimizers(states: dict[Any, Any]) -> None:
    for key, state in states.items():
        found = _OTHERS & {*state} if isinstance(state, dict) else set()
        if found and not {*MOMENTS} & {*state}:
            raise ValueError(
                f"state of param {key} lacks {list(KEYS)} and has {sorted(found)}: this is another "
                "optimizer's checkpoint"
            )
