"""The optimizers under study, by the names they have in tables and figures."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor
from torch.optim import Optimizer

import radam_kernels

from . import frame


def warmup(steps: int) -> int:
    """T of a run of so many steps: a fifth of them.

    The authors' recipe for IWSLT'14 De-En has 4,000 of 70,000. Of a few hundred steps that would be
    so few that deep models stall all the same.
    """
    return -(-steps // 5)


def hold(steps: int) -> int:
    """k of a run of so many steps, the updates of Adam-2k that go into psi alone: 2,000 of 70,000.

    So long the authors' recipe for IWSLT'14 De-En trains.
    """
    return -(-steps * 2_000 // 70_000)


Make = Callable[[Iterable[Tensor], float, int], Optimizer]  # parameters, lr and steps of the run
MAKE: dict[str, Make] = {
    "Adam": lambda params, lr, steps: frame.Adam(params, lr),
    "Adam-2k": lambda params, lr, steps: frame.Adam(params, lr, hold=hold(steps)),
    "Adam-2k, longer": lambda params, lr, steps: frame.Adam(params, lr, hold=warmup(steps)),
    "Adam-eps": lambda params, lr, steps: frame.Adam(params, lr, eps=1e-4),
    "Adam with warmup": lambda params, lr, steps: frame.Adam(params, lr, warmup=warmup(steps)),
    "RAdam": lambda params, lr, steps: radam_kernels.RAdam(params, lr),
    "RAdam, threshold 4": lambda params, lr, steps: radam_kernels.RAdam(
        params, lr, rho_threshold=4.0
    ),
    "RAdam, exact": lambda params, lr, steps: radam_kernels.RAdam(
        params, lr, rectification="exact"
    ),
    "RAdam, exact, threshold 4": lambda params, lr, steps: radam_kernels.RAdam(
        params, lr, rectification="exact", rho_threshold=4.0
    ),
    "SGD with momentum": lambda params, lr, steps: frame.Momentum(params, lr),
}


def slug(name: str) -> str:
    """A name as it goes into the key of a run."""
    return name.lower().replace(", ", "-").replace(" ", "-")
