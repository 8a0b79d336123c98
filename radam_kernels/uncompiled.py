"""RAdam's step as torch.compile meets it: a graph break, with its reason.

Imported only in a compiled function, because it imports torch._dynamo, which takes a second.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .optimizer import RAdam

_REASON = (
    "radam_kernels.RAdam.step is one call of a fused kernel already, and counts steps on the host: "
    "compile the model or the loss and call step() outside of it, or call radam_kernels.radam_ "
    "with the number of the step, which is an operator"
)
# torch < 2.7 has no `reason`.
_options = {"reason": _REASON} if "reason" in signature(torch.compiler.disable).parameters else {}


@torch.compiler.disable(**_options)
def step(optimizer: RAdam, closure: Callable[[], float] | None) -> float | None:
    return optimizer._step(closure)
