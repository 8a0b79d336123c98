"""Computes the scalars of a step, in float64, from a step count and the hyperparameters."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from math import expm1, inf, log, sqrt
from numbers import Real
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from .formats import step_key

Form: TypeAlias = Literal["first_order", "exact"]
FORMS: tuple[Form, ...] = get_args(Form)


class Action(IntEnum):
    """What a step does to a parameter; every kernel uses these values."""

    SKIP = 0  # write nothing, because of found_inf; set by backends, never by step_scalars
    HOLD = 1  # update the moments only
    MOMENTUM = 2  # p - step_size * m
    RECTIFIED = 3  # p - step_size * (m / (sqrt(v) + eps))


# Cached, because looking up and converting enum members takes 0.3 us.
_HOLD, _MOMENTUM, _RECTIFIED = map(float, (Action.HOLD, Action.MOMENTUM, Action.RECTIFIED))


class StepScalars(NamedTuple):
    """The scalars of one step, all float64, in the order of the C++ struct of the same name."""

    grad_scale: float  # multiplies the gradient: inverse loss scale, negative for maximize
    weight_decay: float  # L2: g + weight_decay * p; 0 for none
    decay: float  # decoupled: p * decay, which is 1 - lr * weight_decay; 1 for none
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    eps: float
    step_size: float  # lr, both bias corrections and r_t
    action: float  # float(Action)
    key_low: float = 0.0  # of random bits; two uint32
    key_high: float = 0.0


def rho_inf(beta2: float) -> float:
    """Length of the approximated moving average for step -> infinity: `2 / (1 - beta2) - 1`, >= 1.

    Source: Liu et al., "On the Variance of the Adaptive Learning Rate and Beyond", ICLR 2020,
    Algorithm 2; torch/optim/radam.py.

    Raises:
        ValueError: beta2 outside [0, 1).
    """
    _check_beta("beta2", beta2)
    return _rho_inf(beta2)


def rho(step: float, beta2: float) -> float:
    """Length of the approximated moving average: `rho_inf - 2 t beta2^t / (1 - beta2^t)`, >= 1.

    `step` (t) counts from 1. Computed without the cancellation in this textbook formula, which
    loses five digits at beta2 = .999999. Source: Liu et al., ICLR 2020, Algorithm 2;
    torch/optim/radam.py.

    Raises:
        ValueError: a step that is not a whole number >= 1, or beta2 outside [0, 1).
    """
    _check_beta("beta2", beta2)
    return _rho(_whole(step), beta2)


def adaptive_variance(rho: float) -> float:
    """Exact variance of the adaptive learning rate: psi^2 ~ Scale-inv-chi^2(rho, tau = 1).

    `rho/(rho-2) - rho 2^(2rho-5)/pi B((rho-1)/2, (rho-1)/2)^2`, B the Beta function; math.inf for
    rho <= 2. Source: Liu et al., ICLR 2020, Theorem 1 and its proof.
    """
    if rho <= 2.0:
        return inf
    # Legendre's duplication turns the Beta term into x (Gamma(x - 1/2) / Gamma(x))^2.
    x = 0.5 * rho
    # The asymptotic expansion of that ratio is accurate for x >= 11: R(x) = R(x + 1) x / (x - 1/2).
    up, shift = x, 1.0
    while up < 11.0:
        factor = up / (up - 0.5)
        shift *= factor * factor
        up += 1.0
    # ln(w R^2) = sum E_2k / (2k (4w)^2k), E the Euler numbers.
    w = up - 0.75
    z = 1.0 / (16.0 * w * w)
    series = -1 / 2 + z * (
        5 / 4 + z * (-61 / 6 + z * (1385 / 8 + z * (-50521 / 10 + z * 2702765 / 12)))
    )
    excess = expm1(z * series)
    if up == x:  # both terms tend to 1, and are canceled analytically
        return (x / w) * (0.25 / (x - 1.0) - excess)
    return x / (x - 1.0) - x * shift * ((1.0 + excess) / w)


def adaptive_variance_first_order(rho: float) -> float:
    """First-order variance of the adaptive learning rate: `rho / (2 (rho - 2) (rho - 4))`.

    math.inf for rho <= 4. Source: Liu et al., ICLR 2020, section 4 (the variance behind r_t).
    """
    if rho <= 4.0:
        return inf
    return rho / (2.0 * (rho - 2.0) * (rho - 4.0))


def check_rho_threshold(rho_threshold: float, form: Form) -> None:
    """Raises ValueError for an unknown form, or a threshold at which its variance is infinite.

    The smallest threshold is 4 for "first_order" and 2 for "exact"; math.inf never rectifies.
    """
    if form not in FORMS:
        raise ValueError(f"rectification: expected one of {FORMS}, got {form!r}")
    least = 4.0 if form == "first_order" else 2.0
    if not rho_threshold >= least:
        raise ValueError(
            f"rho_threshold: expected at least {least} for rectification={form!r}, got "
            f"{rho_threshold!r}; the variance is infinite for rho <= {least}"
        )


def check_seed(seed: float) -> None:
    """Raises ValueError for a seed that is no whole number in [0, 2**32)."""
    if not isinstance(seed, Real) or not (0 <= seed < 2**32 and seed == int(seed)):
        raise ValueError(f"seed: expected a whole number in [0, 2**32), got {seed!r}")


def rectification(
    step: float, beta2: float, *, form: Form = "first_order", rho_threshold: float = 5.0
) -> float | None:
    """The factor r_t in (0, 1], or None (do not rectify) when `rho_t <= rho_threshold`.

    `sqrt(Var(rho_inf) / Var(rho_t))`; with form "first_order" that is torch's
    `sqrt((rho_t-4)(rho_t-2) rho_inf / ((rho_inf-4)(rho_inf-2) rho_t))`. The default threshold, 5.0,
    is torch's; Algorithm 2 of the paper has 4.0; the authors' code rectifies at exactly 5.0, too.
    Source: Liu et al., ICLR 2020, Algorithm 2 and Theorem 1; torch/optim/radam.py.

    Raises:
        ValueError: as `rho`; an unknown form, or a threshold at which its variance is infinite.
    """
    _check_beta("beta2", beta2)
    check_rho_threshold(rho_threshold, form)
    return _rectification(_whole(step), beta2, form, rho_threshold)


def step_scalars(
    step: float,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
    rho_threshold: float = 5.0,
    degenerated_to_sgd: bool = True,
    rectification: Form = "first_order",
    grad_scale: float = 1.0,
    seed: int = 0,
) -> StepScalars:
    """The scalars of one step; `step` includes this step, so it is 1 for the first.

    Rectified: `step_size = lr sqrt(1 - beta2^t) r_t / (1 - beta1^t)`. At or below `rho_threshold`:
    `lr / (1 - beta1^t)` on the momentum (torch), or with `degenerated_to_sgd=False` neither a step
    nor decoupled decay (the authors' code). `grad_scale` multiplies the gradient (1 / loss scale).
    `seed` gives the key of random bits, with the step.
    `step` may be a whole float. A float32 step tensor stops counting at 2**24, as in torch.
    Raises ValueError for a step that is not a whole number >= 1, betas outside [0, 1), eps negative
    or NaN, a seed that is no whole number in [0, 2**32), and as `check_rho_threshold` does; lr and
    weight_decay are not checked here.
    Source: Liu et al., ICLR 2020, Algorithm 2; torch/optim/radam.py; the authors' radam.py.
    """
    t = _whole(step)
    _check_beta("beta1", beta1)
    _check_beta("beta2", beta2)
    if not eps >= 0.0:
        raise ValueError(f"eps: expected a number >= 0, got {eps!r}")
    check_rho_threshold(rho_threshold, rectification)
    check_seed(seed)

    # Narrower types, such as numpy's float32, would otherwise reduce the precision.
    lr, beta1, beta2, eps = float(lr), float(beta1), float(beta2), float(eps)
    weight_decay, grad_scale = float(weight_decay), float(grad_scale)
    rho_threshold = float(rho_threshold)

    decay = 1.0 - lr * weight_decay if decoupled_weight_decay else 1.0
    step_size = lr / _bias_correction(t, beta1)
    r_t = _rectification(t, beta2, rectification, rho_threshold)
    if r_t is not None:
        action = _RECTIFIED
        step_size *= sqrt(_bias_correction(t, beta2)) * r_t
    elif degenerated_to_sgd:
        action = _MOMENTUM
    else:
        action, step_size, decay = _HOLD, 0.0, 1.0
    return StepScalars(
        -grad_scale if maximize else grad_scale,
        0.0 if decoupled_weight_decay else weight_decay,
        decay,
        1.0 - beta1,
        beta2,
        1.0 - beta2,
        eps,
        step_size,
        action,
        *map(float, step_key(int(seed), t)),
    )


def group_scalars(group: Mapping[str, Any], step: float) -> StepScalars:
    """`step_scalars` for a parameter group: a dict with RAdam's keys, optionally `grad_scale`.

    Raises ValueError as `step_scalars` and `weight_decay_of` do.
    """
    beta1, beta2 = group["betas"]
    return step_scalars(
        step,
        lr=float(group["lr"]),
        beta1=float(beta1),
        beta2=float(beta2),
        eps=float(group["eps"]),
        weight_decay=weight_decay_of(group),
        decoupled_weight_decay=group["decoupled_weight_decay"],
        maximize=group["maximize"],
        **{name: group[name] for name in _OPTIONAL if name in group},
    )


def weight_decay_of(group: Mapping[str, Any]) -> float:
    """The weight decay of a parameter group, divided by its `initial_lr` if `decouple_lr`.

    So the decoupled decay becomes `1 - weight_decay * lr / initial_lr`. Raises ValueError for
    `decouple_lr` without `decoupled_weight_decay`, or without an `initial_lr` > 0.
    """
    weight_decay = float(group["weight_decay"])
    if not group.get("decouple_lr", False):
        return weight_decay
    if not group["decoupled_weight_decay"]:
        raise ValueError(
            "decouple_lr=True needs decoupled_weight_decay=True: an L2 penalty is no decay of the "
            "parameter"
        )
    initial_lr = group.get("initial_lr")
    if initial_lr is None or not float(initial_lr) > 0.0:
        raise ValueError(
            f"decouple_lr=True divides by the group's initial_lr: expected a number > 0, got "
            f"{initial_lr!r}; construct RAdam with lr > 0, or set initial_lr in the group to the "
            "learning rate at which a step shall decay by weight_decay"
        )
    return weight_decay / float(initial_lr)


_OPTIONAL = ("rho_threshold", "degenerated_to_sgd", "rectification", "grad_scale", "seed")


def _whole(step: float) -> float:
    t = float(step)
    if not (t >= 1.0 and t.is_integer()):
        raise ValueError(f"step: expected a whole number >= 1 (1 is the first step), got {step!r}")
    return t


def _check_beta(name: str, beta: float) -> None:
    if not 0.0 <= beta < 1.0:
        raise ValueError(f"{name}: expected 0 <= {name} < 1, got {beta!r}")


def _bias_correction(t: float, beta: float) -> float:
    return -expm1(t * log(beta)) if beta else 1.0


def _rho_inf(beta2: float) -> float:
    return 2.0 / (1.0 - beta2) - 1.0


def _rho(t: float, beta2: float) -> float:
    if not beta2:
        return 1.0
    h = -log(beta2)
    th = t * h
    # Above 50 the correction is below rounding error, and expm1 would overflow later.
    if th > 50.0:
        return _rho_inf(beta2)
    if th > 1.0:
        return _rho_inf(beta2) - 2.0 * t / expm1(th)
    # The same value, with its large terms (2/h each) canceled analytically.
    return t + _langevin(0.5 * h) - t * _langevin(0.5 * th)


def _langevin(y: float) -> float:
    # coth y - 1/y by Lambert's continued fraction, exact to the last bit for 0 <= y <= 0.5.
    s = y * y
    return y / (3.0 + s / (5.0 + s / (7.0 + s / (9.0 + s / (11.0 + s / (13.0 + s / 15.0))))))


def _rectification(t: float, beta2: float, form: Form, rho_threshold: float) -> float | None:
    rho_t = _rho(t, beta2)
    if rho_t <= rho_threshold:
        return None
    variance = adaptive_variance_first_order if form == "first_order" else adaptive_variance
    # The variance decreases with rho, so only rounding can put the ratio above 1.
    return min(1.0, sqrt(variance(_rho_inf(beta2)) / variance(rho_t)))
