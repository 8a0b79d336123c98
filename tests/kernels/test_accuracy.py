"""Holds a step to the paper's formulas in 50-digit arithmetic, and float32 to float64."""

from dataclasses import dataclass

import mpmath as mp
import pytest
import torch
from torch import Tensor

import radam_kernels
from tests.helpers import USUAL

FORMS = {
    "plain": {},
    "L2": dict(weight_decay=0.1),
    "decoupled": dict(weight_decay=0.1, decoupled_weight_decay=True),
    "maximize": dict(maximize=True),
    "exact": dict(rectification="exact"),
    "exact, from step 3": dict(rectification="exact", rho_threshold=2.0),
    "paper": dict(rho_threshold=4.0, degenerated_to_sgd=False),
}
by_form = pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)


@dataclass(frozen=True)
class Tolerances:
    """Errors allowed, in units in the last place of the magnitudes that `Magnitudes` adds up."""

    exp_avg: float
    exp_avg_sq: float
    param: float


class Magnitudes:
    """How large the terms of every sum get along a run: what errors are measured against."""

    def __init__(self, n: int) -> None:
        self.grad, self.way = torch.zeros(2, n, dtype=torch.float64)
        self.m = self.v = self.p = torch.zeros(n, dtype=torch.float64)

    def add(self, grad: Tensor, before: Tensor, after: Tensor, m: Tensor, v: Tensor) -> None:
        """One step: its gradient, the parameter before and after it, and the new moments."""
        terms = grad.double().abs() + 0.1 * before.abs()  # weight decay, where there is one
        self.grad = torch.maximum(self.grad, terms)
        self.p, self.m, self.v = after.abs(), m.abs() + self.grad, v + 1e-3 * self.grad**2
        # An error of the moments counts for more where their terms cancel.
        self.way = self.way + (after - before).abs() * (self.m / m.abs()) * (self.v / v)

    def units(self, p: Tensor, m: Tensor, v: Tensor, dtype: torch.dtype) -> Tolerances:
        """The largest errors of a run, given the error of each element."""
        eps = torch.finfo(dtype).eps
        return Tolerances(
            exp_avg=(m.abs() / self.m).max().item() / eps,
            exp_avg_sq=(v.abs() / self.v).max().item() / eps,
            param=(p.abs() / (self.p + self.way)).max().item() / eps,
        )


# Each operation and each narrowed scalar errs by half a unit. Worst observed: 0.54, 1.55, 1.67.
ONE_STEP = Tolerances(exp_avg=1.0, exp_avg_sq=2.0, param=3.0)
# In a hundred steps the second moment forgets no error. Worst observed: 3.3, 22.4, 9.6.
HUNDRED_STEPS = Tolerances(exp_avg=5.0, exp_avg_sq=30.0, param=15.0)


def true_variance(rho, form):
    if form == "first_order":
        return rho / (2 * (rho - 2) * (rho - 4))
    beta = mp.beta((rho - 1) / 2, (rho - 1) / 2)
    return rho / (rho - 2) - rho * mp.mpf(2) ** (2 * rho - 5) / mp.pi * beta**2


def true_step(p, g, m, v, t, **options):
    """Algorithm 2 of Liu et al. (ICLR 2020) for one element, as it is printed there.

    With what torch adds: eps, weight decay, and momentum steps below the threshold.
    """
    o = {"rho_threshold": 5, "degenerated_to_sgd": True, "rectification": "first_order", **options}
    lr, b1, b2, eps = (mp.mpf(o[key]) for key in ("lr", "beta1", "beta2", "eps"))
    decay = mp.mpf(o.get("weight_decay", 0))
    rho_inf = 2 / (1 - b2) - 1
    rho = rho_inf - 2 * t * b2**t / (1 - b2**t)
    rectified = rho > o["rho_threshold"]
    if o.get("maximize"):
        g = -g
    if not o.get("decoupled_weight_decay"):
        g = g + decay * p
    elif rectified or o["degenerated_to_sgd"]:
        p = p * (1 - lr * decay)
    m = b1 * m + (1 - b1) * g
    v = b2 * v + (1 - b2) * g * g
    m_hat = m / (1 - b1**t)
    if rectified:
        form = o["rectification"]
        r = mp.sqrt(true_variance(rho_inf, form) / true_variance(rho, form))
        # torch, and the authors' code, add eps before the bias correction.
        p = p - lr * r * m_hat * mp.sqrt(1 - b2**t) / (mp.sqrt(v) + eps)
    elif o["degenerated_to_sgd"]:
        p = p - lr * m_hat
    return p, m, v


def values(n: int) -> tuple[Tensor, ...]:
    """Float32 values over eight magnitudes, so that every dtype starts from the same."""
    torch.manual_seed(0)
    p, g, m, v = (torch.randn(n) * 10 ** (8 * torch.rand(n) - 6) for _ in range(4))
    return p, g, m, v.abs()


def step_(streams, t: int, options) -> None:
    radam_kernels.radam_(*streams, step=t, **USUAL, **options)


def assert_within(seen: Tolerances, allowed: Tolerances) -> None:
    for name, bound in vars(allowed).items():
        assert vars(seen)[name] <= bound, f"{name}: {seen}"


def float32_errors(grads, first: int, options) -> Tolerances:
    """The errors of a run in float32 against the same in float64."""
    p, _, m, v = values(len(grads[0]))
    true_p, true_m, true_v = p.double(), m.double(), v.double()
    magnitudes = Magnitudes(len(p))
    for t, grad in enumerate(grads, first):
        before = true_p.clone()
        step_((true_p, grad.double(), true_m, true_v), t, options)
        step_((p, grad, m, v), t, options)
        magnitudes.add(grad, before, true_p, true_m, true_v)
    return magnitudes.units(p - true_p, m - true_m, v - true_v, torch.float32)


@by_form
@pytest.mark.parametrize("t", [1, 5, 6, 100, 10**6])
def test_one_step_of_float32_against_float64(options, t):
    assert_within(float32_errors([values(20_000)[1]], t, options), ONE_STEP)


@by_form
def test_a_hundred_steps_of_float32_against_float64(options):
    torch.manual_seed(1)
    grads = torch.randn(100, 5_000)
    assert_within(float32_errors(grads, 1, options), HUNDRED_STEPS)


def as_float64(elements) -> list[Tensor]:
    """(param, exp_avg, exp_avg_sq) of elements in many digits."""
    return [
        torch.tensor([float(x) for x in column], dtype=torch.float64)
        for column in zip(*elements, strict=True)
    ]


@by_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("steps", [1, 100])
def test_steps_against_50_digits(options, dtype, steps):
    p, _, m, v = (x.to(dtype) for x in values(8))
    torch.manual_seed(1)
    grads = torch.randn(steps, len(p)).to(dtype)
    magnitudes = Magnitudes(len(p))
    with mp.workdps(50):
        truth = [[mp.mpf(x.item()) for x in element] for element in zip(p, m, v, strict=True)]
        for t, grad in enumerate(grads, 1):
            before = as_float64(truth)[0]
            for i, (pi, mi, vi) in enumerate(truth):
                truth[i] = true_step(pi, mp.mpf(grad[i].item()), mi, vi, t, **USUAL, **options)
            magnitudes.add(grad, before, *as_float64(truth))
            step_((p, grad, m, v), t, options)
        # The difference in many digits: the truth rounded to float64 would be off by as much.
        errors = as_float64(
            [mp.mpf(x.item()) - y for x, y in zip(got, true, strict=True)]
            for got, true in zip(zip(p, m, v, strict=True), truth, strict=True)
        )
    assert_within(magnitudes.units(*errors, dtype), ONE_STEP if steps == 1 else HUNDRED_STEPS)


@by_form
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_one_step_of_16_bits_rounds_once(options, dtype):
    p, g, m, v = (x.to(dtype).float().clamp(-100, 100) for x in values(20_000))
    narrow = [x.to(dtype) for x in (p, g, m, v)]
    step_(narrow, 8, options)
    truth = [x.double() for x in (p, g, m, v)]
    step_(truth, 8, options)
    info = torch.finfo(dtype)
    for got, true in zip(narrow, truth, strict=True):
        # Half a unit of the rounding at the end, and a little for float32 before it.
        ulp = 2 ** true.abs().clamp(min=info.smallest_normal).log2().floor() * info.eps
        noise = (true.abs() + g.abs() + p.abs()) * 5 * torch.finfo(torch.float32).eps
        assert ((got.double() - true).abs() <= ulp / 2 + noise).all()
