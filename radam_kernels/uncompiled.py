"""RAdam's step as torch.compile meets it: a graph break, with its reason.

Imported only in a compiled function, because it imports torch._dynamo, which takes a second.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .optimizer import RAdam

_REASON = (
    "RAdam.step runs uncompiled: it is a fused kernel already, and counts steps on the host; to "
    "compile without a graph break, compile the model or the loss and call step() outside, or call "
    "radam_kernels.radam_, which is an operator and takes the number of the step"
)
# torch < 2.7 has no `reason`.
_options: dict[str, Any] = (
    {"reason": _REASON} if "reason" in signature(torch.compiler.disable).parameters else {}
)


@torch.compiler.disable(**_options)
def step(optimizer: RAdam, closure: Callable[[], float] | None) -> float | None:
    return optimizer._step(closure)
