"""Many copies of a one-dimensional problem, stepped at once: optimizers work by element."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from radam_kernels import RAdam

from .frame import Adam

LAST_MOMENTUM = 5  # the last step before rho_t is above the package's threshold
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "Adam": Adam,
    "RAdam": RAdam,
    "RAdam, waiting": lambda params, **options: RAdam(params, degenerated_to_sgd=False, **options),
    "AMSGrad": lambda params, **options: torch.optim.Adam(params, amsgrad=True, **options),
}


def walk(
    optimizer: str,
    x: Tensor,
    gradient: Callable[[int, Tensor], Tensor],
    steps: int,
    *,
    lr: Callable[[int], float],
    bound: float | None = None,
    **options: Any,
) -> Iterator[Tensor]:
    """The positions after each step from `x`, one element a chain; each is overwritten by the next.

    Args:
        gradient: of all chains, at a step (from 1) and their positions.
        lr: of a step.
        bound: project back onto [-bound, bound] after each step.
    """
    x = x.clone().requires_grad_()
    stepper = OPTIMIZERS[optimizer]([x], lr=lr(1), **options)
    for t in range(1, steps + 1):
        x.grad = gradient(t, x.detach())
        stepper.param_groups[0]["lr"] = lr(t)
        stepper.step()
        if bound is not None:
            x.detach().clamp_(-bound, bound)
        yield x.detach()
