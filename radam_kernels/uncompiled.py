"""Methods of RAdam as torch.compile meets them: a graph break, with its reason.

Imported only in a compiled function, because it imports torch._dynamo, which takes a second.
"""

from collections.abc import Callable
from inspect import signature
from typing import Any, TypeVar

import torch

T = TypeVar("T")

_REASON = (
    "RAdam.step runs uncompiled, and so does clip_grad_norm_: they are fused kernels already, and "
    "the host counts steps; to compile without a graph break, compile the model or the loss and "
    "call step() outside, or call radam_kernels.radam_, which is an operator and takes the number "
    "of the step"
)
# torch < 2.7 has no `reason`.
_options: dict[str, Any] = (
    {"reason": _REASON} if "reason" in signature(torch.compiler.disable).parameters else {}
)


@torch.compiler.disable(**_options)
def call(method: Callable[..., T], *arguments: object) -> T:
    return method(*arguments)
