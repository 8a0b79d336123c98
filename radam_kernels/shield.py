"""Carries state through Optimizer.load_state_dict, which casts every tensor that it sees."""

from itertools import chain
from typing import Any

from torch.optim import Optimizer

from .staging import MOMENTS, check_state


class Shielded:
    """Carries a value through Optimizer.load_state_dict, which casts every tensor it sees."""

    def __init__(self, value: Any) -> None:
        self.value = value


def unshield(value: Any) -> Any:
    return value.value if isinstance(value, Shielded) else value


def shield_state(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Checks a state dict against the parameters, and wraps what torch would cast."""
    params = chain.from_iterable(g["params"] for g in optimizer.param_groups)
    ids = chain.from_iterable(g["params"] for g in state_dict["param_groups"])
    owners = dict(zip(ids, params, strict=False))  # torch complains of lengths, after the hooks
    shielded = {}
    for key, state in state_dict["state"].items():
        if key in owners and state:
            check_state(state, owners[key], f"param {key}")
            keys = ("step", *MOMENTS)
            state = {k: Shielded(v) if k in keys else v for k, v in state.items()}
        shielded[key] = state
    return {**state_dict, "state": shielded}
