"""Exchanges master weights with float32 state dicts of the model."""

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import formats
from .layout import REMAINDER, layout_of, master_weight
from .sharding import local, redistributed, wrap_local
from .state import remainder_of

if TYPE_CHECKING:
    from .optimizer import RAdam


def export_masters(optimizer: "RAdam", model: nn.Module) -> dict[str, Any]:
    """The model's state dict, the optimizer's parameters in float32."""
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    _refuse_strangers(trained, model)
    exported = model.state_dict()
    made: dict[int, Tensor] = {}  # tied parameters once
    for name, param in model.named_parameters(remove_duplicate=False):
        if id(param) in trained and name in exported:
            if id(param) not in made:
                remainder = remainder_of(optimizer.state.get(param), param, name)
                made[id(param)] = master_weight(param, remainder)
            exported[name] = made[id(param)]
    return exported


@torch.no_grad()
def import_masters(
    optimizer: "RAdam", model: nn.Module, state_dict: dict[str, Any], strict: bool
) -> None:
    """Loads a float32 state dict: upper halves into the model, lower halves into the state."""
    layouts = {
        id(param): layout_of(param, group)
        for group in optimizer.param_groups
        for param in group["params"]
    }
    _refuse_strangers(layouts.keys(), model)
    weights = dict(state_dict)
    remainders: list[tuple[Tensor, Tensor]] = []
    stale: list[Tensor] = []
    for name, param in model.named_parameters(remove_duplicate=False):
        layout = layouts.get(id(param))
        if layout is None or name not in state_dict:
            continue
        if layout.remainder is None:
            stale.append(param)  # float32 since: the next step would add what it has
            continue
        value = state_dict[name]
        if not isinstance(value, Tensor) or value.shape != param.shape:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{name}: expected shape {tuple(param.shape)}, got {got}")
        value = local(redistributed(value, param, name)).to(local(param).device, torch.float32)
        # To nearest, where a step would round stochastically.
        half = torch.full_like(value, 0x80, dtype=torch.int64)
        weight, rest = formats.split_weight(value, half if layout.remainder == torch.int8 else None)
        weights[name] = wrap_local(weight, param)
        remainders.append((param, rest))
    try:
        model.load_state_dict(weights, strict=strict)
    finally:  # torch loads what there is, and then raises for missing keys
        _set_remainders(optimizer, remainders, stale)


def _refuse_strangers(trained: Collection[int], model: nn.Module) -> None:
    if not any(id(param) in trained for param in model.parameters()):
        raise ValueError(
            "the model has no parameter of this optimizer: give the model whose parameters the "
            "optimizer was constructed with"
        )


def _set_remainders(
    optimizer: "RAdam", remainders: list[tuple[Tensor, Tensor]], stale: list[Tensor]
) -> None:
    for param in stale:
        optimizer.state.get(param, {}).pop(REMAINDER, None)
    for param, rest in remainders:
        own = optimizer.state[param]
        old = own.get(REMAINDER)
        if isinstance(old, Tensor) and local(old).dtype == rest.dtype and old.shape == param.shape:
            local(old).copy_(rest)
        else:
            own[REMAINDER] = wrap_local(torch.empty_like(local(param), dtype=rest.dtype), param)
            local(own[REMAINDER]).copy_(rest)
