"""Holds the scalars of a step to 60-digit arithmetic, to torch's formula and to stated rules."""

from __future__ import annotations

import math
from functools import lru_cache

import mpmath as mp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from radam_kernels import schedule
from radam_kernels.schedule import Action, StepScalars

STEPS = (1, 2, 3, 5, 6, 10, 1000, 10**6, 10**9)
BETA2S = (0.0, 1e-300, 0.1, 0.5, 0.9, 0.99, 0.999, 0.9999, 0.99999, 0.999999)
USUAL_BETA2S = (0.9, 0.99, 0.999, 0.9999, 0.99999)
VARIANCE_RHOS = (
    *(2.0 + gap for gap in (4.5e-16, 1e-12, 1e-6, 1e-3, 0.1)),
    *(2.5, 3.0, 4.0, 4.000001, 5.0, 8.0, 12.0, 16.0, 20.0, 21.0, 21.9),
    *(math.nextafter(22.0, 0.0), 22.0, math.nextafter(22.0, 99.0), 22.1, 23.0, 24.0, 30.0),
    *(35.0, 40.0, 45.0, 50.0, 55.0, 59.9, 100.0, 1999.0, 19999.0, 2e5, 2e6),
)
USUAL = dict(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8)

by_step = pytest.mark.parametrize("step", STEPS, ids=lambda t: f"step={t}")
by_beta2 = pytest.mark.parametrize("beta2", BETA2S, ids=lambda b: f"beta2={b}")
by_usual_beta2 = pytest.mark.parametrize("beta2", USUAL_BETA2S, ids=lambda b: f"beta2={b}")
by_form = pytest.mark.parametrize("form", schedule.FORMS)


@pytest.fixture(autouse=True)
def sixty_digits():
    with mp.workdps(60):
        yield


def relative_error(got: float, truth: mp.mpf) -> float:
    return float(abs(mp.mpf(got) - truth) / abs(truth))


def true_rho_inf(beta2):
    return 2 / (1 - mp.mpf(beta2)) - 1


def true_rho(step, beta2):
    power = mp.mpf(beta2) ** step
    return true_rho_inf(beta2) - 2 * step * power / (1 - power)


@lru_cache
def true_variance(rho, form):
    rho = mp.mpf(rho)
    if form == "first_order":
        return rho / (2 * (rho - 2) * (rho - 4))
    beta_function = mp.exp(2 * mp.loggamma((rho - 1) / 2) - mp.loggamma(rho - 1))
    return rho / (rho - 2) - rho * mp.mpf(2) ** (2 * rho - 5) / mp.pi * beta_function**2


def true_rectification(step, beta2, form, threshold):
    rho = true_rho(step, beta2)
    if rho <= threshold:
        return None
    return mp.sqrt(true_variance(true_rho_inf(beta2), form) / true_variance(rho, form))


def first_rectified_step(beta2: float, **options) -> int:
    steps = range(1, 100)
    return next(t for t in steps if schedule.rectification(t, beta2, **options) is not None)


# rho


@by_beta2
def test_rho_inf_is_right_to_the_last_bits(beta2):
    assert relative_error(schedule.rho_inf(beta2), true_rho_inf(beta2)) < 1e-15


@by_beta2
@by_step
def test_rho_is_right_to_the_last_bits(step, beta2):
    assert relative_error(schedule.rho(step, beta2), true_rho(step, beta2)) < 2e-15


@pytest.mark.parametrize("th", [0.999, 0.999999, 1.000001, 1.001, 49.99, 50.01, 709.0, 711.0])
@pytest.mark.parametrize("beta2", [0.9, 0.999, 0.999999], ids=lambda b: f"beta2={b}")
def test_rho_is_right_on_both_sides_of_its_branches(th, beta2):
    step = max(1, round(th / -math.log(beta2)))
    assert relative_error(schedule.rho(step, beta2), true_rho(step, beta2)) < 2e-15


@given(st.integers(1, 10**9), st.floats(0.0, 0.999999))
@settings(max_examples=200, deadline=None)
def test_rho_grows_with_the_step_from_1_to_rho_inf(step, beta2):
    slack = 1e-15
    now, then = schedule.rho(step, beta2), schedule.rho(step + 1, beta2)
    assert now <= then * (1 + slack)
    assert 1 - slack <= now <= schedule.rho_inf(beta2) * (1 + slack)


# variance


@pytest.mark.parametrize("rho", VARIANCE_RHOS, ids=lambda r: f"rho={r!r}")
def test_exact_variance_is_the_papers_beta_function_form(rho):
    error = relative_error(schedule.adaptive_variance(rho), true_variance(rho, "exact"))
    assert error < (2e-13 if rho < 22 else 3e-14)


@pytest.mark.parametrize("rho", [4.000001, 4.5, 5.0, 22.0, 1999.0, 2e6], ids=lambda r: f"rho={r}")
def test_first_order_variance_is_the_papers_approximation(rho):
    got = schedule.adaptive_variance_first_order(rho)
    assert relative_error(got, true_variance(rho, "first_order")) < 1e-15


@pytest.mark.parametrize("rho", [2.0, 1.0, 0.5], ids=lambda r: f"rho={r}")
def test_exact_variance_is_infinite_up_to_2(rho):
    assert schedule.adaptive_variance(rho) == math.inf


@pytest.mark.parametrize("rho", [4.0, 3.0, 2.0, 1.0], ids=lambda r: f"rho={r}")
def test_first_order_variance_is_infinite_up_to_4(rho):
    assert schedule.adaptive_variance_first_order(rho) == math.inf


def test_both_variances_agree_for_large_rho():
    exact, approximate = (
        schedule.adaptive_variance(2e6),
        schedule.adaptive_variance_first_order(2e6),
    )
    assert exact == pytest.approx(approximate, rel=1e-5)


@given(st.floats(2.000001, 2e6), st.floats(1.0001, 2.0))
@settings(max_examples=200, deadline=None)
def test_exact_variance_falls_as_rho_grows(rho, factor):
    assert schedule.adaptive_variance(rho) > schedule.adaptive_variance(rho * factor)


# r_t and its threshold


@by_form
@by_beta2
@by_step
def test_rectification_is_right_against_60_digits(step, beta2, form):
    truth = true_rectification(step, beta2, form, threshold=5)
    got = schedule.rectification(step, beta2, form=form)
    if truth is None:
        assert got is None
    else:
        assert relative_error(got, truth) < 1e-13


@by_beta2
@by_step
def test_exact_rectification_is_right_down_to_its_least_threshold(step, beta2):
    truth = true_rectification(step, beta2, "exact", threshold=2)
    got = schedule.rectification(step, beta2, form="exact", rho_threshold=2.0)
    assert (got is None) == (truth is None)
    assert got is None or relative_error(got, truth) < 1e-13


@pytest.mark.parametrize("step", [6, 10, 100, 1000], ids=lambda t: f"step={t}")
@pytest.mark.parametrize("beta2", [0.9, 0.99, 0.999], ids=lambda b: f"beta2={b}")
def test_first_order_step_size_is_torchs_textbook_formula(step, beta2):
    lr, beta1 = 1e-3, 0.9
    bias_correction1 = 1 - beta1**step
    bias_correction2 = 1 - beta2**step
    rho_inf = 2 / (1 - beta2) - 1
    rho_t = rho_inf - 2 * step * (beta2**step) / bias_correction2
    rect = math.sqrt((rho_t - 4) * (rho_t - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho_t))
    textbook = lr * rect * math.sqrt(bias_correction2) / bias_correction1
    got = schedule.step_scalars(step, lr=lr, beta1=beta1, beta2=beta2, eps=1e-8)
    assert schedule.rectification(step, beta2) == pytest.approx(rect, rel=1e-11)
    assert got.step_size == pytest.approx(textbook, rel=1e-11)


@by_usual_beta2
@by_form
def test_the_papers_threshold_rectifies_from_step_5(beta2, form):
    assert first_rectified_step(beta2, form=form, rho_threshold=4.0) == 5


@by_usual_beta2
@by_form
def test_torchs_threshold_rectifies_from_step_6_and_is_the_default(beta2, form):
    assert first_rectified_step(beta2, form=form, rho_threshold=5.0) == 6
    assert first_rectified_step(beta2, form=form) == 6


def test_the_default_form_is_first_order():
    default = schedule.rectification(100, 0.999)
    assert default == schedule.rectification(100, 0.999, form="first_order")
    assert default != schedule.rectification(100, 0.999, form="exact")


@by_form
def test_rho_of_exactly_the_threshold_is_not_rectified_as_in_torch(form):
    beta2 = 0.75
    assert schedule.rho(10**6, beta2) == 7.0
    assert schedule.rectification(10**6, beta2, form=form, rho_threshold=7.0) is None


def test_a_threshold_one_bit_lower_rectifies_at_equality_as_the_authors_do():
    assert schedule.rectification(10**6, 0.75, rho_threshold=math.nextafter(7.0, 0.0)) == 1.0


@pytest.mark.parametrize("beta2", [0.0, 0.1, 0.5, 0.6], ids=lambda b: f"beta2={b}")
def test_small_beta2_never_rectifies(beta2):
    assert schedule.rectification(10**9, beta2) is None
    assert schedule.rectification(10**9, beta2, rho_threshold=4.0) is None


@by_form
@pytest.mark.parametrize("beta2", [*USUAL_BETA2S, 0.999999], ids=lambda b: f"beta2={b}")
def test_rectification_ends_at_exactly_1(beta2, form):
    assert schedule.rectification(10**9, beta2, form=form) == 1.0


@pytest.mark.parametrize(("step", "beta2"), [(437, 0.9128919947268785), (332, 0.8919295335194559)])
def test_rounding_never_lifts_rectification_above_1(step, beta2):
    assert schedule.rho(step, beta2) < schedule.rho_inf(beta2)
    assert schedule.rectification(step, beta2, form="exact") <= 1.0


def test_an_infinite_threshold_never_rectifies():
    assert schedule.rectification(10**9, 0.999, rho_threshold=math.inf) is None


@given(st.integers(1, 10**9), st.floats(0.0, 0.999999), st.sampled_from(schedule.FORMS))
@settings(max_examples=200, deadline=None)
def test_rectification_is_in_0_to_1(step, beta2, form):
    r_t = schedule.rectification(step, beta2, form=form, rho_threshold=4.0)
    assert r_t is None or 0.0 < r_t <= 1.0


# StepScalars


@by_form
@by_beta2
@by_step
@pytest.mark.parametrize("beta1", [0.0, 0.9], ids=lambda b: f"beta1={b}")
def test_every_scalar_of_a_step_is_right_against_60_digits(step, beta2, beta1, form):
    lr, wd, grad_scale = 3e-3, 0.1, 1 / 3
    got = schedule.step_scalars(
        step,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=1e-8,
        weight_decay=wd,
        decoupled_weight_decay=True,
        rectification=form,
        grad_scale=grad_scale,
    )
    r_t = true_rectification(step, beta2, form, threshold=5)
    step_size = mp.mpf(lr) / (1 - mp.mpf(beta1) ** step)
    if r_t is not None:
        step_size *= mp.sqrt(1 - mp.mpf(beta2) ** step) * r_t
    truths = dict(
        decay=1 - mp.mpf(lr) * mp.mpf(wd),
        one_minus_beta1=1 - mp.mpf(beta1),
        one_minus_beta2=1 - mp.mpf(beta2),
        step_size=step_size,
    )
    limits = dict(step_size=1e-13)
    for field, truth in truths.items():
        assert relative_error(getattr(got, field), truth) < limits.get(field, 2.3e-16), field
    assert got.beta2 == beta2
    assert got.eps == 1e-8
    assert got.grad_scale == grad_scale
    assert got.weight_decay == 0.0
    assert got.action == (Action.MOMENTUM if r_t is None else Action.RECTIFIED)


@pytest.mark.parametrize("step", [1, 100], ids=lambda t: f"step={t}")
@pytest.mark.parametrize("degenerated_to_sgd", [True, False])
def test_every_field_is_a_plain_float_even_for_whole_number_arguments(step, degenerated_to_sgd):
    got = schedule.step_scalars(
        step,
        lr=1,
        beta1=0,
        beta2=0.999,
        eps=0,
        weight_decay=1,
        grad_scale=1,
        degenerated_to_sgd=degenerated_to_sgd,
    )
    assert [type(value) for value in got] == [float] * len(StepScalars._fields)


def test_below_the_threshold_the_step_is_bias_corrected_momentum():
    got = schedule.step_scalars(3, **USUAL, weight_decay=0.1, decoupled_weight_decay=True)
    assert got.action == Action.MOMENTUM
    assert got.step_size == pytest.approx(1e-3 / (1 - 0.9**3), rel=1e-14)
    assert got.decay == 1 - 1e-3 * 0.1


def test_without_degenerated_to_sgd_early_steps_neither_step_nor_decay():
    options = dict(weight_decay=0.1, decoupled_weight_decay=True, degenerated_to_sgd=False)
    for step in range(1, 6):
        got = schedule.step_scalars(step, **USUAL, **options)
        assert (got.action, got.step_size, got.decay) == (Action.HOLD, 0.0, 1.0)
        assert (got.one_minus_beta2, got.grad_scale) == (1 - 0.999, 1.0)


def test_degenerated_to_sgd_changes_nothing_once_rectified():
    options = dict(weight_decay=0.1, decoupled_weight_decay=True)
    with_it, without = (
        schedule.step_scalars(6, **USUAL, **options, degenerated_to_sgd=d) for d in (True, False)
    )
    assert with_it == without
    assert with_it.action == Action.RECTIFIED


def test_weight_decay_is_l2_unless_decoupled():
    got = schedule.step_scalars(100, **USUAL, weight_decay=0.1)
    assert (got.weight_decay, got.decay) == (0.1, 1.0)


def test_no_weight_decay_leaves_both_forms_neutral():
    for decoupled in (False, True):
        got = schedule.step_scalars(100, **USUAL, decoupled_weight_decay=decoupled)
        assert (got.weight_decay, got.decay) == (0.0, 1.0)


def test_maximize_negates_the_gradient_and_keeps_the_loss_scale():
    got = schedule.step_scalars(100, **USUAL, maximize=True, grad_scale=0.25)
    assert got.grad_scale == -0.25
    assert got[1:] == schedule.step_scalars(100, **USUAL)[1:]


def test_the_threshold_and_the_form_reach_the_step():
    at_4 = schedule.step_scalars(5, **USUAL, rho_threshold=4.0)
    assert at_4.action == Action.RECTIFIED
    exact = schedule.step_scalars(5, **USUAL, rho_threshold=4.0, rectification="exact")
    assert exact.step_size != at_4.step_size


def test_a_step_counted_in_a_float_is_the_same_step():
    for step in (1, 7, 2**24):
        whole = schedule.step_scalars(step, **USUAL)
        assert schedule.step_scalars(float(step), **USUAL) == whole


def test_narrow_numpy_numbers_do_not_narrow_the_step():
    np = pytest.importorskip("numpy")
    wide = dict(lr=3e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, grad_scale=0.3)
    narrow = {name: np.float32(value) for name, value in wide.items()}
    rounded = {name: float(value) for name, value in narrow.items()}
    for step in (1, 6):
        got = schedule.step_scalars(np.float32(step), **narrow)
        assert got == schedule.step_scalars(step, **rounded)
        assert [type(value) for value in got] == [float] * len(StepScalars._fields)


def test_any_lr_is_taken_as_torch_takes_it():
    assert schedule.step_scalars(6, **(USUAL | dict(lr=0.0))).step_size == 0.0
    assert schedule.step_scalars(6, **(USUAL | dict(lr=-1.0))).step_size < 0.0


# refusals


@pytest.mark.parametrize("step", [0, -1, 0.5, 1.5, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "call",
    [
        lambda step: schedule.rho(step, 0.999),
        lambda step: schedule.rectification(step, 0.999),
        lambda step: schedule.step_scalars(step, **USUAL),
    ],
    ids=["rho", "rectification", "step_scalars"],
)
def test_a_step_that_is_not_a_whole_number_from_1_is_refused_by_name(call, step):
    with pytest.raises(ValueError, match=rf"^step: .*got {step}$"):
        call(step)


@pytest.mark.parametrize("beta", [1.0, 1.5, -0.1, math.nan, math.inf])
def test_betas_outside_0_to_1_are_refused_by_name(beta):
    for name in ("beta1", "beta2"):
        with pytest.raises(ValueError, match=rf"^{name}: .*got {beta}$"):
            schedule.step_scalars(6, **(USUAL | {name: beta}))
    for call in (schedule.rho_inf, lambda b: schedule.rho(6, b)):
        with pytest.raises(ValueError, match=rf"^beta2: .*got {beta}$"):
            call(beta)
    with pytest.raises(ValueError, match=rf"^beta2: .*got {beta}$"):
        schedule.rectification(6, beta)


@pytest.mark.parametrize("eps", [-1e-8, -math.inf, math.nan])
def test_eps_negative_or_nan_is_refused_by_name(eps):
    with pytest.raises(ValueError, match=rf"^eps: .*got {eps}$"):
        schedule.step_scalars(6, **(USUAL | dict(eps=eps)))


@pytest.mark.parametrize(("form", "least"), [("first_order", 4.0), ("exact", 2.0)])
def test_a_threshold_where_the_variance_is_infinite_is_refused(form, least):
    schedule.check_rho_threshold(least, form)
    for bad in (math.nextafter(least, 0.0), 0.0, -math.inf, math.nan):
        for call in (
            lambda bad: schedule.check_rho_threshold(bad, form),
            lambda bad: schedule.rectification(6, 0.999, form=form, rho_threshold=bad),
            lambda bad: schedule.step_scalars(6, **USUAL, rectification=form, rho_threshold=bad),
        ):
            with pytest.raises(ValueError, match=rf"rho_threshold: .*least {least}.*got {bad};"):
                call(bad)


def test_an_unknown_form_is_refused_with_the_choices():
    for call in (
        lambda: schedule.check_rho_threshold(5.0, "second_order"),
        lambda: schedule.rectification(6, 0.999, form="second_order"),
        lambda: schedule.step_scalars(6, **USUAL, rectification="second_order"),
    ):
        with pytest.raises(ValueError, match=r"'first_order', 'exact'.*got 'second_order'"):
            call()
