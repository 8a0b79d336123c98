"""A parameter's state: `step`, `exp_avg` and `exp_avg_sq`, in the format of torch.optim.RAdam."""

from numbers import Integral, Real
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.optim import Optimizer

from .flat import is_dense
from .formats import convert_remainder
from .hyperparameters import FORMATS
from .layout import (
    EXPONENTS,
    EXTRAS,
    MOMENTS,
    REMAINDER,
    collective,
    decoded,
    fill,
    fits,
    is_block8,
    is_remainder,
    layout_of,
    new_tensors,
)
from .sharding import (
    check_local_shape,
    is_sharded,
    local,
    redistributed,
    same_placement,
    wrap_local,
)

KEYS = ("step", *MOMENTS)
_STEP_DTYPES = (torch.float32, torch.float64)


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
    tensors = MOMENTS + ((REMAINDER,) if is_remainder(state.get(REMAINDER)) else ())
    for key in tensors:
        problem = _shape_problem(state[key], param)
        if not problem and key != REMAINDER and not is_block8(state, key):
            problem = _dtype_problem(state[key], param)
        if problem:
            raise ValueError(
                f"{key} of {name}: {problem}; the parameter or its state has changed: delete the "
                "state to start from zero"
            )
        check_storage(state[key], name, f"{key} of ")
        if key != REMAINDER and is_block8(state, key):
            check_storage(state[EXPONENTS[key]], name, f"{EXPONENTS[key]} of ")
        if same_placement(state[key], param):
            check_local_shape(state[key], param, f"{key} of ", name)


def _shape_problem(moment: Any, param: Tensor) -> str | None:
    """Why a value can't belong to a parameter, whatever its dtype; None if it can."""
    if not isinstance(moment, Tensor) or moment.shape != param.shape:
        got = tuple(moment.shape) if isinstance(moment, Tensor) else type(moment).__name__
        return f"expected shape {tuple(param.shape)}, got {got}"
    if moment.layout != torch.strided or (moment.is_meta and not param.is_meta):
        kind = "meta" if moment.is_meta else moment.layout
        return f"expected a dense tensor with memory, got {kind}"
    return None


def _dtype_problem(moment: Tensor, param: Tensor) -> str | None:
    if moment.is_complex() == param.is_complex() and (
        moment.is_floating_point() or moment.is_complex()
    ):
        return None
    if moment.dtype == torch.uint8:
        return "codes of block8 without exponents that fit them"
    return f"can't keep moments of {param.dtype} in {moment.dtype}"


def placed_tensors(state: dict[str, Any] | None, owner: Tensor, name: object) -> dict[str, Tensor]:
    """The tensors of a validated state, placed as the parameter is; empty if it has none.

    What can't be used is left out: exponents of moments that are floats, and a remainder of
    another dtype (torch.optim.RAdam casts it to bfloat16, and keeps it through training).
    """
    state = state or {}
    found = {key: state[key] for key in MOMENTS if key in state}
    if is_remainder(state.get(REMAINDER)) and owner.dtype in (torch.bfloat16, torch.float32):
        found[REMAINDER] = state[REMAINDER]
    placed: dict[str, Tensor] = {}
    for key, tensor in found.items():
        if key != REMAINDER and is_block8(state, key):
            if same_placement(tensor, owner):
                placed |= {key: tensor, EXPONENTS[key]: state[EXPONENTS[key]]}
                continue
            tensor = decoded(state, key)
        if not same_placement(tensor, owner):
            tensor = collective(tensor) if key == REMAINDER else tensor
            tensor = redistributed(tensor, owner, f"{key} of {name}")
        placed[key] = tensor
    return placed


def remainder_of(state: Any, param: Tensor, name: object) -> Tensor | None:
    """The remainder in a parameter's state; ValueError if it can't belong to the parameter."""
    remainder = state.get(REMAINDER) if isinstance(state, dict) else None
    if not is_remainder(remainder):
        return None
    if problem := _shape_problem(remainder, param):
        raise ValueError(f"{REMAINDER} of {name}: {problem}; delete it to go on without")
    check_storage(remainder, name, f"{REMAINDER} of ")
    return remainder


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
    groups = [dict(saved) for saved in state_dict["param_groups"]]
    loaded = []
    # Not strict: torch checks lengths after the hooks.
    for group, saved in zip(optimizer.param_groups, groups, strict=False):
        _keep_formats(saved, group)
        for key, owner in zip(saved["params"], group["params"], strict=False):
            if key not in states:
                continue
            check_state(states[key], owner, f"param {key}")
            if not is_new(states[key]) or REMAINDER in states[key]:
                states[key] = dict(states[key])
                loaded.append((key, owner, {**group, **saved}))
    ours, converted = [], []
    for key, owner, options in loaded:
        state = states[key]
        ours.append(state)
        if "step" in state:
            step = as_step(state["step"], step_device(owner, options))
            state["step"] = step.clone() if step is state["step"] else step
        placed = placed_tensors(state, owner, f"param {key}")
        for k in {*EXTRAS} - placed.keys():
            state.pop(k, None)
        for k, tensor in placed.items():  # keys stay where they are among a wrapper's
            state[k] = tensor if k in EXPONENTS.values() else wrap_local(local(tensor), owner)
        layout = layout_of(owner, options)
        if layout.remainder is not None and REMAINDER in state:
            plain = convert_remainder(local(state[REMAINDER]), layout.remainder)
            state[REMAINDER] = wrap_local(plain, owner)
        # The step encodes floats that belong in block8, wherever they come from.
        waits = layout.block8 and not all(is_block8(state, k) for k in MOMENTS)
        if not is_new(state) and not waits and (flatten or not fits(state, owner, layout)):
            converted.append((owner, layout, state))
    made = new_tensors([c[0] for c in converted], [c[1] for c in converted], flatten=flatten)
    for (owner, _, state), tensors in zip(converted, made, strict=True):
        fill(tensors, state)
        for k in EXTRAS:
            if k != REMAINDER or owner.dtype == torch.bfloat16:
                state.pop(k, None)
        state.update(tensors)
    for state in ours:
        state.update({k: Loaded(state[k]) for k in (*KEYS, *EXTRAS) if k in state})
    return {**state_dict, "state": states, "param_groups": groups}


def _keep_formats(saved: dict[str, Any], group: dict[str, Any]) -> None:
    """Gives a saved group the formats of the optimizer's, and its seed if it has none."""
    for name in FORMATS:
        saved.pop(name, None)
    saved.update({name: group[name] for name in FORMATS if name in group})
    if "seed" in group:
        saved.setdefault("seed", group["seed"])


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
