"""Warns of an optimizer that trains nothing, which torch's optimizers do silently."""

import sys
import warnings
from pathlib import Path
from typing import Any

import torch

STEPS = 3


class Watch:
    """Looks at the first steps of an optimizer, and warns at the last of them.

    Attributes:
        sizes: how many parameters each group had when it was added.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        self.sizes: list[int] = [len(group["params"]) for group in groups]
        self._steps = 0
        self._trained = False

    def is_over(self) -> bool:
        return self._steps == STEPS

    def look(self, groups: list[dict[str, Any]], *, trained: bool) -> None:
        """Call at each step until is_over(). `trained`: some parameter has a gradient."""
        self._steps += 1
        self._trained |= trained
        if not self.is_over():
            return
        lost = [
            f"param_groups[{i}]"
            for i, (group, size) in enumerate(zip(groups, self.sizes, strict=False))
            if size and not group["params"]
        ]
        moved = sum(len(group["params"]) for group in groups) >= sum(self.sizes)
        if lost and not moved:
            problem = (
                f"{', '.join(lost)} had parameters and has none any more: they are not trained"
            )
        elif not self._trained:
            problem = f"no parameter has had a gradient in {STEPS} steps: {_why(groups)}"
        else:
            return
        warnings.warn(f"radam_kernels.RAdam: {problem}", stacklevel=_caller_level())


def _caller_level() -> int:
    """The stack level, for _caller_level's caller, of the code that called step().

    Above it are torch's wrapper of step(), and those of learning rate schedulers.
    """
    inside = (str(Path(__file__).parent), str(Path(torch.__file__).parent))
    level, frame = 0, sys._getframe(0)
    while frame.f_back and frame.f_code.co_filename.startswith(inside):
        level, frame = level + 1, frame.f_back
    return level


def _why(groups: list[dict[str, Any]]) -> str:
    params = [param for group in groups for param in group["params"]]
    if not any(param.requires_grad for param in params):
        return "all are frozen (requires_grad is False)"
    if any(param.is_meta for param in params):
        return "some are on the meta device; construct the optimizer after to_empty()"
    return (
        "they may not be the model's, because fully_shard(), to_empty() and others replace a "
        "model's parameters; construct the optimizer after that, from model.parameters()"
    )
