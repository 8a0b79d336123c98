"""Shared by the simulations: log-spaced steps, and optimizers on one-dimensional problems."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from radam_kernels import RAdam

from ..harness.optimizers import Adam

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "Adam": Adam,
    "RAdam": RAdam,
    "RAdam, waiting": lambda params, **options: RAdam(params, degenerated_to_sgd=False, **options),
    "AMSGrad": lambda params, **options: torch.optim.Adam(params, amsgrad=True, **options),
}


def log_spaced_steps(first: float, last: float, points: int) -> list[int]:
    """At most `points` different integers, evenly spaced on a logarithmic scale."""
    return sorted({round(step) for step in np.geomspace(first, last, points)})


def trajectory(
    optimizer: str,
    x: Tensor,
    gradient: Callable[[int, Tensor], Tensor],
    steps: int,
    *,
    lr: Callable[[int], float],
    bound: float | None = None,
    **options: Any,
) -> Iterator[Tensor]:
    """Yields the positions after each step; the tensor is overwritten by the next step.

    Args:
        x: initial positions. Each element is an independent copy of the problem, since the
            optimizers work elementwise.
        gradient: of all elements, from the step (counted from 1) and the positions.
        lr: learning rate of a step.
        bound: positions are projected onto [-bound, bound] after each step.
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
