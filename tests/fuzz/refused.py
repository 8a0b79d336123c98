"""Edits that every step, or every load, must refuse."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import Parameter

from radam_kernels import RAdam
from tests.helpers import MOMENTS, randn

SHAPE = (3, 50)


def add_plain_group(optimizer: RAdam) -> tuple[Parameter, Parameter]:
    """Adds two parameters that any edit of below can spoil, and gives them gradients."""
    params = Parameter(randn(*SHAPE)), Parameter(randn(*SHAPE, seed=1))
    plain = dict.fromkeys(("state_dtype", "master_weights", "capturable", "stochastic_rounding"))
    optimizer.add_param_group({"params": list(params), **plain, "decouple_lr": False})
    for p in params:
        p.grad = torch.ones_like(p)
    return params


def option(name: str, value: object) -> Callable:
    return lambda o, p, q, own: o.param_groups[-1].update({name: value})


def of_state(key: str, value: object) -> Callable:
    return lambda o, p, q, own: own.update({key: value})


def freed(find: Callable[..., Tensor], size: int = 0) -> Callable:
    return lambda o, p, q, own: find(p, own).untyped_storage().resize_(size)


def set_data(t: Tensor, data: Tensor) -> None:
    t.data = data


def share(p: Tensor, q: Tensor, room: Tensor, step: int) -> None:
    """Both become views that overlap; one of them is dense only if step is 1."""
    p.data, q.data = room[75:][: 150 * step : step].view(SHAPE), room[:150].view(SHAPE)


# Each gets the optimizer, two of its parameters that have been stepped and have gradients, and the
# state of the first.
STEPS: dict[str, Callable[[RAdam, Tensor, Tensor, dict], object]] = {
    **{
        f"{name}={value}": option(name, value)
        for name, value in [
            ("betas", (1.0, 0.9)),
            ("betas", (0.9, 1.0)),
            ("betas", (0.9, math.nan)),
            ("betas", (0.9,)),
            ("betas", (-0.1, 0.9)),
            ("eps", -1e-8),
            ("eps", math.nan),
            ("rho_threshold", 3.0),
            ("rectification", "second"),
            ("seed", -1),
            ("seed", 2**32),
            ("master_weights", 16),
            ("state_dtype", "block4"),
            ("state_dtype", torch.float64),
        ]
    },
    **{f"step {x!r}": of_state("step", x) for x in ("3", None, -1.0, 0.5, math.nan, 2**53 + 2)},
    "step of two": of_state("step", torch.ones(2)),
    "step on meta": of_state("step", torch.ones((), device="meta")),
    "no step": lambda o, p, q, own: own.pop("step"),
    "no moment": lambda o, p, q, own: own.pop("exp_avg_sq"),
    "moment of another shape": of_state("exp_avg", torch.zeros(50, 3)),
    "moment of integers": of_state("exp_avg", torch.zeros(SHAPE, dtype=torch.int64)),
    "complex moment": of_state("exp_avg", torch.zeros(SHAPE, dtype=torch.complex64)),
    "moment on meta": of_state("exp_avg_sq", torch.zeros(SHAPE, device="meta")),
    "moment that is a number": of_state("exp_avg_sq", 0.0),
    "moments that are one": lambda o, p, q, own: own.update(exp_avg=own["exp_avg_sq"]),
    "moment of another": lambda o, p, q, own: own.update(exp_avg=o.state[q]["exp_avg"]),
    "step of another": lambda o, p, q, own: own.update(step=o.state[q]["step"]),
    "state of another": lambda o, p, q, own: o.state.update({q: own}),
    "state that is a list": lambda o, p, q, own: o.state.update({p: [1]}),
    "moment freed": freed(lambda p, own: own["exp_avg"]),
    "moment shrunk": freed(lambda p, own: own["exp_avg_sq"], 300),
    "parameter freed": freed(lambda p, own: p),
    "parameter shrunk": freed(lambda p, own: p, 599),
    "gradient freed": freed(lambda p, own: p.grad),
    "step freed": freed(lambda p, own: own["step"]),
    "given twice": lambda o, p, q, own: o.param_groups[-1]["params"].append(p),
    "memory of another": lambda o, p, q, own: set_data(p, q.data),
    "half of another": lambda o, p, q, own: share(p, q, torch.zeros(225), 1),
    "every other of another": lambda o, p, q, own: share(p, q, torch.zeros(375), 2),
    "memory of a moment": lambda o, p, q, own: set_data(p, own["exp_avg"]),
    "expanded": lambda o, p, q, own: set_data(p, torch.ones(1).expand(SHAPE)),
    "gradient in a moment": lambda o, p, q, own: set_data(p.grad, own["exp_avg"]),
    "gradient in a parameter": lambda o, p, q, own: set_data(p.grad, q.data),
    "gradient of another shape": lambda o, p, q, own: set_data(p.grad, torch.ones(50, 3)),
    "complex gradient": lambda o, p, q, own: set_data(p.grad, 1j * torch.ones(SHAPE)),
    "sparse gradient": lambda o, p, q, own: setattr(p, "grad", p.grad.to_sparse()),
}


# Each gets a state dict whose last two parameters are as above, and the state of the last.
LOADS: dict[str, Callable[[dict, dict], object]] = {
    "moment of another shape": lambda saved, own: own.update(exp_avg=torch.zeros(7)),
    "moment that is text": lambda saved, own: own.update(exp_avg="x"),
    "no moment": lambda saved, own: own.pop("exp_avg"),
    "no step": lambda saved, own: own.pop("step"),
    "step of two": lambda saved, own: own.update(step=torch.ones(2)),
    "complex moment": lambda saved, own: own.update(exp_avg=1j * torch.zeros(SHAPE)),
    "moment freed": lambda saved, own: own["exp_avg"].untyped_storage().resize_(0),
    "state that is a list": lambda saved, own: saved["state"].update({max(saved["state"]): []}),
    "remainder of another shape": lambda saved, own: own.update(
        param_remainder=torch.zeros(3, dtype=torch.int16)
    ),
    "a group too few": lambda saved, own: saved["param_groups"].pop(),
    "a parameter too few": lambda saved, own: saved["param_groups"][-1]["params"].pop(),
    "another optimizer's": lambda saved, own: (own.clear(), own.update(momentum_buffer=None)),
    "moments of another": lambda saved, own: [own.pop(key) for key in MOMENTS],
}
