"""The range of every hyperparameter."""

from typing import Any

from torch import Tensor

from .modules import DTYPES
from .schedule import check_rho_threshold


def check_options(options: dict[str, Any]) -> None:
    """Raises ValueError, naming the value, for hyperparameters out of range."""
    lr, betas = options["lr"], options["betas"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"Tensor lr must be 1-element, got shape {tuple(lr.shape)}")
    if not 0.0 <= lr:
        raise ValueError(f"Invalid learning rate: {lr}; expected a number >= 0")
    if not 0.0 <= options["eps"]:
        raise ValueError(f"Invalid epsilon value: {options['eps']}; expected a number >= 0")
    if len(betas) != 2:
        raise ValueError(f"Invalid betas: {betas}; expected two numbers")
    for i, beta in enumerate(betas):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {i}: {beta}; expected 0 <= beta < 1")
    if not 0.0 <= options["weight_decay"]:
        raise ValueError(
            f"Invalid weight_decay value: {options['weight_decay']}; expected a number >= 0"
        )
    check_rho_threshold(options["rho_threshold"], options["rectification"])
    if options["state_dtype"] is not None and options["state_dtype"] not in DTYPES[:3]:
        raise ValueError(
            f"Invalid state_dtype: {options['state_dtype']}; expected None or one of {DTYPES[:3]}"
        )
    if options["differentiable"]:
        raise NotImplementedError(
            "radam_kernels.RAdam does not support differentiable=True; use differentiable=False, "
            "or torch.optim.RAdam for this"
        )
