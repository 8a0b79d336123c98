"""What GradScaler leaves on an optimizer whose steps it does not want to wait for."""

from typing import NamedTuple

import torch
from torch import Tensor


class Scaling(NamedTuple):
    """Loss scale and verdict of `torch.amp.GradScaler`, as float32 tensors of one element."""

    grad_scale: Tensor | None = None  # the gradients are divided by it
    found_inf: Tensor | None = None  # not zero: skip the step, and do not count it

    def on(self, device: torch.device) -> "Scaling":
        """The same on a GPU; the host does not wait for a copy between GPUs."""
        return Scaling(
            *(
                None
                if x is None
                else torch.as_tensor(x).to(device, torch.float32, non_blocking=True)
                for x in self
            )
        )

    def addresses(self) -> tuple[int, int]:
        """Where the two are in memory; 0 for None. Keep this object while they are read."""
        return tuple(0 if x is None else x.data_ptr() for x in self)

    def numbers(self) -> tuple[float, float]:
        """The two on the host, which waits for them; what changes nothing for None."""
        return tuple(
            default if x is None else float(x) for x, default in zip(self, (1.0, 0.0), strict=True)
        )


UNSCALED = Scaling()
