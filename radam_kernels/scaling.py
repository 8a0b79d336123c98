"""The loss scale and the result of GradScaler, which it passes as attributes of the optimizer."""

from typing import NamedTuple

import torch
from torch import Tensor


class Scaling(NamedTuple):
    """`grad_scale` and `found_inf` of `torch.amp.GradScaler`, float32 tensors of one element."""

    grad_scale: Tensor | None = None  # the gradients are divided by it
    found_inf: Tensor | None = None  # nonzero: skip the step, and do not count it

    def on(self, device: torch.device) -> "Scaling":
        """The same on a GPU; copies between GPUs do not synchronize the host."""
        return Scaling(
            *(
                None
                if x is None
                else torch.as_tensor(x).to(device, torch.float32, non_blocking=True)
                for x in self
            )
        )

    def addresses(self) -> tuple[int, int]:
        """Both addresses, 0 for None. Keep this object alive while they are read."""
        return tuple(0 if x is None else x.data_ptr() for x in self)

    def numbers(self) -> tuple[float, float]:
        """Both values, which synchronizes with a GPU; (1.0, 0.0) for None."""
        return tuple(
            default if x is None else float(x) for x, default in zip(self, (1.0, 0.0), strict=True)
        )


UNSCALED = Scaling()
