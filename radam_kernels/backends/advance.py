"""Advances step counts on their device in float64 torch operations, without synchronizing.

For backends without a kernel for it. schedule.py is the same for one count, with explanations.
"""

import math
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..hyperparameters import complete
from ..modules import cpu
from ..schedule import (
    Action,
    StepScalars,
    adaptive_variance,
    adaptive_variance_first_order,
    weight_decay_of,
)
from ..schedule import rho_inf as rho_inf_of

_T = TypeVar("_T", float, Tensor)


@torch.no_grad()
def advance(bucket: cpu.Bucket) -> Tensor:
    """Advances the counts of a capturable bucket; returns float64 [segments, StepScalars].

    Rows agree with schedule.group_scalars to 1e-10, and keys in every bit. If a count is not a
    whole number >= 0, or found_inf is nonzero, the row is zeros (Action.SKIP) and the count is
    unchanged.
    """
    device = bucket.steps[0][0].device
    grad_scale, found_inf, _ = bucket.scaling.on(device)
    rows = torch.zeros((bucket.count, len(StepScalars._fields)), dtype=torch.float64, device=device)
    members: dict[tuple[int, torch.dtype], list[int]] = {}
    for i, (step, group) in enumerate(bucket.steps):
        members.setdefault((group, step.dtype), []).append(i)
    for (group, _), indices in members.items():
        counts = [bucket.steps[i][0].view(()) for i in indices]
        before = torch.stack(counts)
        after = before + 1
        t = after.double()
        good = (t >= 1) & (t <= 2.0**53) & (t == t.floor())
        if found_inf is not None:
            good &= found_inf == 0
        columns = _columns(bucket.groups[group], t, grad_scale)
        made = torch.stack([_column(columns[name], t) for name in StepScalars._fields], 1)
        made = torch.where(good[:, None], made, 0.0)
        if len(members) == 1:
            rows = made
        else:  # by slices, because an index would have to be uploaded
            for i, row in zip(indices, made, strict=True):
                rows[i].copy_(row)
        torch._foreach_copy_(counts, list(torch.where(good, after, before).unbind()))
    return rows


def _columns(
    group: dict[str, Any], t: Tensor, grad_scale: Tensor | None
) -> dict[str, float | Tensor]:
    """StepScalars for all counts `t`: numbers, or float64 tensors on the counts' device."""
    group = complete(group)
    lr = group["lr"]
    lr = lr.double() if isinstance(lr, Tensor) and lr.device == t.device else float(lr)
    lr = lr.view(()) if isinstance(lr, Tensor) else lr
    beta1, beta2 = map(float, group["betas"])
    weight_decay, decoupled = weight_decay_of(group), group["decoupled_weight_decay"]
    exact = group["rectification"] == "exact"
    inf, rho_t = rho_inf_of(beta2), _rho(t, beta2)
    key = _splitmix64(_signed(int(group["seed"]) << 32) ^ t.long())

    variance = adaptive_variance if exact else adaptive_variance_first_order
    of_t = _adaptive_variance(rho_t) if exact else rho_t / (2 * (rho_t - 2) * (rho_t - 4))
    r_t = (variance(inf) / of_t).sqrt().clamp(max=1.0)
    rectified = rho_t > float(group["rho_threshold"])
    momentum = group["degenerated_to_sgd"]
    step_size = lr / _bias_correction(t, beta1)
    decay = 1.0 - lr * weight_decay if decoupled else 1.0
    scale = 1.0 if grad_scale is None else grad_scale.double().view(()).reciprocal()
    return {
        "grad_scale": -scale if group["maximize"] else scale,
        "weight_decay": 0.0 if decoupled else weight_decay,
        "decay": torch.where(rectified | momentum, _column(decay, t), 1.0),
        "one_minus_beta1": 1.0 - beta1,
        "beta2": beta2,
        "one_minus_beta2": 1.0 - beta2,
        "eps": float(group["eps"]),
        "step_size": torch.where(
            rectified,
            step_size * _bias_correction(t, beta2).sqrt() * r_t,
            step_size if momentum else 0.0,
        ),
        "action": torch.where(
            rectified,
            _column(float(Action.RECTIFIED), t),
            float(Action.MOMENTUM if momentum else Action.HOLD),
        ),
        "key_low": (key & 0xFFFFFFFF).double(),
        "key_high": _shifted(key, 32).double(),
    }


def _column(x: float | Tensor, t: Tensor) -> Tensor:
    # torch.as_tensor would copy from the host.
    return x.expand_as(t) if isinstance(x, Tensor) else torch.full_like(t, x)


def _signed(x: int) -> int:
    """A uint64 as the int64 of the same bits."""
    return x - 2**64 if x >= 2**63 else x


def _shifted(x: Tensor, by: int) -> Tensor:
    """To the right, as unsigned numbers: int64 shifts copies of the sign in."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def _splitmix64(x: Tensor) -> Tensor:
    """As formats.splitmix64, on int64, whose products wrap around."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _bias_correction(t: Tensor, beta: float) -> Tensor:
    return -torch.expm1(t * math.log(beta)) if beta else torch.ones_like(t)


def _rho(t: Tensor, beta2: float) -> Tensor:
    if not beta2:
        return torch.ones_like(t)
    h = -math.log(beta2)
    th = t * h
    far = rho_inf_of(beta2) - 2.0 * t / torch.expm1(th)  # 2t/inf is 0
    near = t + _langevin(0.5 * h) - t * _langevin(0.5 * th.clamp(max=1.0))
    return torch.where(th > 1.0, far, near)


def _langevin(y: _T) -> _T:
    s = y * y
    return y / (3.0 + s / (5.0 + s / (7.0 + s / (9.0 + s / (11.0 + s / (13.0 + s / 15.0))))))


def _adaptive_variance(rho: Tensor) -> Tensor:
    x = 0.5 * rho
    up, shift = x, torch.ones_like(x)
    for _ in range(10):  # from 1, below which the variance is infinite, to 11
        factor = torch.where(up < 11.0, up / (up - 0.5), 1.0)
        shift = shift * factor * factor
        up = torch.where(up < 11.0, up + 1.0, up)
    w = up - 0.75
    z = 1.0 / (16.0 * w * w)
    series = -1 / 2 + z * (
        5 / 4 + z * (-61 / 6 + z * (1385 / 8 + z * (-50521 / 10 + z * 2702765 / 12)))
    )
    excess = torch.expm1(z * series)
    return torch.where(
        up == x,
        (x / w) * (0.25 / (x - 1.0) - excess),
        x / (x - 1.0) - x * shift * ((1 + excess) / w),
    )
