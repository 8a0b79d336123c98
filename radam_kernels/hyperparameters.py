"""The hyperparameters of a parameter group: one table of their defaults and ranges."""

from collections.abc import Callable, Container
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .modules import DTYPES, cpu
from .schedule import check_rho_threshold, check_seed, weight_decay_of


class Hyperparameter(NamedTuple):
    """A row of the table; `check` raises ValueError, naming the value, if it is out of range."""

    default: Any
    check: Callable[[Any], None] | None = None


def _check_lr(lr: Any) -> None:
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"Tensor lr must be 1-element, got shape {tuple(lr.shape)}")
    if not 0.0 <= lr:
        raise ValueError(f"Invalid learning rate: {lr}; expected a number >= 0")


def _check_betas(betas: Any) -> None:
    if len(betas) != 2:
        raise ValueError(f"Invalid betas: {betas}; expected two numbers")
    for i, beta in enumerate(betas):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {i}: {beta}; expected 0 <= beta < 1")


def _check_eps(eps: Any) -> None:
    if not 0.0 <= eps:
        raise ValueError(f"Invalid epsilon value: {eps}; expected a number >= 0")


def _check_weight_decay(weight_decay: Any) -> None:
    if not 0.0 <= weight_decay:
        raise ValueError(f"Invalid weight_decay value: {weight_decay}; expected a number >= 0")


def _check_state_dtype(dtype: Any) -> None:
    if dtype is not None and dtype not in (*DTYPES[:3], *cpu.dtypes[:3], "block8"):
        raise ValueError(
            f"Invalid state_dtype: {dtype}; expected None, one of {DTYPES[:3]} or its name, or "
            '"block8"'
        )


def _check_master_weights(bits: Any) -> None:
    if bits not in (None, 24, 32):
        raise ValueError(f"Invalid master_weights: {bits}; expected None, 24 or 32 bits")


def _check_differentiable(differentiable: Any) -> None:
    if differentiable:
        raise NotImplementedError(
            "radam_kernels.RAdam does not support differentiable=True; use differentiable=False, "
            "or torch.optim.RAdam for this"
        )


# In the order of torch.optim.RAdam's defaults, then ours. csrc/core/schedule.h lists those that
# kernels use, and valid() there checks their ranges at every step, because users edit groups. (A
# negative lr or weight_decay is refused at construction only, as in torch.)
TABLE = {
    "lr": Hyperparameter(1e-3, _check_lr),
    "betas": Hyperparameter((0.9, 0.999), _check_betas),
    "eps": Hyperparameter(1e-8, _check_eps),
    "weight_decay": Hyperparameter(0.0, _check_weight_decay),
    "maximize": Hyperparameter(False),
    "foreach": Hyperparameter(None),
    "capturable": Hyperparameter(False),
    "decoupled_weight_decay": Hyperparameter(False),
    "differentiable": Hyperparameter(False, _check_differentiable),
    "rho_threshold": Hyperparameter(5.0),
    "degenerated_to_sgd": Hyperparameter(True),
    "rectification": Hyperparameter("first_order"),
    "state_dtype": Hyperparameter(None, _check_state_dtype),
    "decouple_lr": Hyperparameter(False),
    "master_weights": Hyperparameter(None, _check_master_weights),
    "stochastic_rounding": Hyperparameter(False),
    "seed": Hyperparameter(0, check_seed),
}
DEFAULTS = {name: row.default for name, row in TABLE.items()}

# What torch.optim.RAdam lacks. It is in `defaults` only if the constructor was given another value,
# and in a group only if it is in `defaults` or has another value. So checkpoints have torch's keys,
# and torch.distributed.checkpoint, which asks a file for exactly the keys of the optimizer that it
# loads into, reads torch's files and ours alike.
OPTIONAL = {
    name: DEFAULTS[name]
    for name in (
        "rho_threshold",
        "degenerated_to_sgd",
        "rectification",
        "state_dtype",
        "decouple_lr",
        "master_weights",
        "stochastic_rounding",
        "seed",
    )
}

# Those that choose formats. An optimizer keeps its own when it loads a checkpoint.
FORMATS = ("state_dtype", "master_weights", "stochastic_rounding")


def draws(group: dict[str, Any]) -> bool:
    """Whether parameters of a group are rounded with random bits."""
    return bool(
        group.get("stochastic_rounding")
        or group.get("master_weights") == 24
        or group.get("state_dtype") == "block8"
    )


def refuse_float16(param: Tensor, group: dict[str, Any], name_of: Callable[[Tensor], str]) -> None:
    """Raises ValueError for a float16 parameter in a group with master weights or rounding."""
    for option in ("master_weights", "stochastic_rounding"):
        if param.dtype == torch.float16 and group.get(option):
            raise ValueError(
                f"{name_of(param)}: {option}={group[option]} is for bfloat16 parameters, got "
                "float16; cast it to bfloat16, or put it in a group with "
                f"{option}={OPTIONAL[option]}"
            )


def complete(group: dict[str, Any]) -> dict[str, Any]:
    """A group's options, with those that are absent because they have their default."""
    return {**OPTIONAL, **group}


def compact(group: dict[str, Any], defaults: Container[str] = ()) -> None:
    """Removes the OPTIONAL that have their default, but for those in the optimizer's `defaults`.

    A seed stays where it is used. A dtype becomes its name, because loggers and checkpoints of
    other formats write JSON.
    """
    for name, default in OPTIONAL.items():
        value = group.get(name, default)
        if isinstance(value, torch.dtype):
            value = str(value).removeprefix("torch.")
        # The default, too, where add_param_group would otherwise fill in the constructor's value.
        usual = isinstance(value, str | Real | None) and value == default
        if name in defaults or not usual or (name == "seed" and draws(group)):
            group[name] = value
        else:
            group.pop(name, None)


def check(options: dict[str, Any]) -> None:
    """Raises ValueError, naming the value, for hyperparameters out of range.

    NotImplementedError for differentiable=True.
    """
    for name, row in TABLE.items():
        if row.check:
            row.check(options[name])
    check_rho_threshold(options["rho_threshold"], options["rectification"])
    if options["state_dtype"] in (torch.float16, "float16"):
        for name in ("master_weights", "stochastic_rounding"):
            if options[name]:
                raise ValueError(
                    f"state_dtype=torch.float16 can't be combined with {name}={options[name]}; "
                    'use torch.bfloat16 or "block8"'
                )
    weight_decay_of({"initial_lr": options["lr"], **options})
