"""What multiplies the gradients of a step and is known on their device only."""

from typing import NamedTuple

import torch
from torch import Tensor


class Scaling(NamedTuple):
    """Tensors of one element. `grad_scale` and `found_inf` are those of `torch.amp.GradScaler`,
    which passes them as attributes of the optimizer."""

    grad_scale: Tensor | None = None  # the gradients are divided by it
    found_inf: Tensor | None = None  # nonzero: skip the step, and do not count it
    factor: Tensor | None = None  # the gradients are multiplied by it

    def on(self, device: torch.device) -> "Scaling":
        """The same on a GPU; copies between GPUs do not synchronize the host."""
        dtypes = (torch.float32, torch.float32, torch.float64)
        return Scaling(
            *(
                None if x is None else torch.as_tensor(x).to(device, dtype, non_blocking=True)
                for x, dtype in zip(self, dtypes, strict=True)
            )
        )

    def numbers(self) -> tuple[float, float, float]:
        """All values, which synchronizes with a GPU; (1.0, 0.0, 1.0) for None."""
        defaults = (1.0, 0.0, 1.0)
        grad_scale, found_inf, factor = (
            default if x is None else float(x) for x, default in zip(self, defaults, strict=True)
        )
        return grad_scale, found_inf, factor


UNSCALED = Scaling()


def address(tensor: Tensor | None) -> int:
    """The address of its memory, 0 for None. Keep the tensor alive while it is read."""
    return 0 if tensor is None else tensor.data_ptr()
