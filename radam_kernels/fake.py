"""Steps under FakeTensorMode: the shapes, dtypes and sizes of a step, without allocating memory.

For tools that plan memory, such as torch.distributed._tools.mem_tracker.
"""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, is_fake
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from .formats import blocks
from .layout import EXPONENTS, MOMENTS, REMAINDER, Layout, layout_of
from .sharding import local
from .state import as_step, is_new, step_device


def is_active() -> bool:
    """Whether a FakeTensorMode is active."""
    return any(isinstance(mode, FakeTensorMode) for mode in _get_current_dispatch_mode_stack())


def any_fake(tensors: list[Tensor]) -> bool:
    return any(map(is_fake, tensors))


def norm(groups: list[dict[str, Any]]) -> Tensor:
    """What stands for the norm of all gradients, on the device of the first."""
    grads = [p.grad for group in groups for p in group["params"] if p.grad is not None]
    wide = any(grad.dtype in (torch.float64, torch.complex128) for grad in grads)
    device = grads[0].device if grads else None
    return torch.zeros((), dtype=torch.float64 if wide else torch.float32, device=device)


@torch.no_grad()
def step(groups: list[dict[str, Any]], state: dict[Tensor, Any]) -> None:
    """Makes the same state as a real step, and writes to the same tensors.

    Raises AssertionError for real tensors, as torch's operations do under the mode.
    """
    for group in groups:
        for param in group["params"]:
            own = state.get(param) or {}
            tensors = [param, param.grad, *(own.get(key) for key in MOMENTS)]
            if param.grad is not None and not all(is_fake(t) for t in tensors if t is not None):
                raise AssertionError(
                    "Please convert all Tensors to FakeTensors first: RAdam.step() has a real "
                    f"parameter, gradient or moment of shape {tuple(param.shape)} beside a "
                    "FakeTensorMode or fake parameters"
                )
    for group in groups:
        for param in group["params"]:
            if param.grad is None:
                continue
            own = state.get(param)
            if own is None or is_new(own):
                made = {"step": as_step(0, step_device(param, group))}
                made |= _new_tensors(param, layout_of(param, group))
                own = state.setdefault(param, {})
                own.update(made)
            if not isinstance(own["step"], Tensor):
                own["step"] = as_step(own["step"], step_device(param, group))
            for key in MOMENTS:
                own[key].copy_(param.grad)
            param.copy_(param.grad)
            own["step"].add_(1)


def _new_tensors(param: Tensor, layout: Layout) -> dict[str, Tensor]:
    made = {key: torch.zeros_like(param, dtype=layout.moments) for key in MOMENTS}
    if layout.remainder is not None:
        made[REMAINDER] = torch.zeros_like(param, dtype=layout.remainder)
    if layout.block8:
        part = local(param)
        rows = blocks(part.numel())
        made |= {key: part.new_zeros(rows, dtype=layout.moments) for key in EXPONENTS.values()}
    return made
