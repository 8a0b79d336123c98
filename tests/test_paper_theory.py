"""The paper's formulas in bench/paper against many digits, their definitions, and Monte Carlo."""

import math

import mpmath as mp
import numpy as np
import pytest

pytest.importorskip("scipy", reason="bench/paper needs scipy: pip install -e '.[paper]'")
from scipy import stats

from bench.paper import theory
from bench.paper.intervals import mean_interval
from bench.paper.noise import momentum_loss
from bench.paper.travel import distances, steps_to
from bench.paper.variance import simulate_psi
from bench.paper.warmup import fit, warmup
from radam_kernels import schedule

RHOS = (2.1, 3.0, 5.0, 10.0, 100.0, 1999.0)
by_rho = pytest.mark.parametrize("rho", RHOS)
by_step = pytest.mark.parametrize("step", [1, 5, 40, 1000])
by_beta2 = pytest.mark.parametrize("beta2", [0.0, 0.5, 0.99, 0.999])
CHAINS = 200_000


@pytest.fixture(autouse=True)
def fifty_digits():
    with mp.workdps(50):
        yield


@pytest.fixture
def generator():
    return np.random.default_rng(0)


def weights(step, beta2):
    powers = [mp.mpf(beta2) ** k for k in range(step)]
    return [power / mp.fsum(powers) for power in powers]


# moving averages


@by_beta2
@by_step
def test_the_centre_of_mass_is_that_of_the_weights(step, beta2):
    truth = mp.fsum((k + 1) * w for k, w in enumerate(weights(step, beta2)))
    assert theory.center_of_mass(step, beta2) == pytest.approx(float(truth), rel=1e-9)


@by_beta2
@by_step
def test_the_length_with_that_centre_is_the_optimizers_rho(step, beta2):
    assert theory.sma_length(step, beta2) == pytest.approx(schedule.rho(step, beta2), rel=1e-9)


@by_beta2
@by_step
def test_the_length_of_equal_variance_is_that_of_the_weights(step, beta2):
    w = theory.ema_weights(step, beta2)
    assert w.sum() == pytest.approx(1.0, rel=1e-12)
    assert w == pytest.approx([float(x) for x in weights(step, beta2)], rel=1e-9)
    assert theory.equal_variance_length(step, beta2) == pytest.approx(1 / (w @ w), rel=1e-9)


def test_both_lengths_agree_at_either_end():
    for step, rel in ((1, 1e-12), (3, 1e-3), (50_000, 1e-12)):
        length = theory.equal_variance_length(step, 0.999)
        assert length == pytest.approx(schedule.rho(step, 0.999), rel=rel)
    assert theory.equal_variance_length(1500, 0.999) > 1.1 * schedule.rho(1500, 0.999)


# Scale-inv-chi^2


@by_rho
@pytest.mark.parametrize("tau", [1.0, 0.1])
def test_the_density_is_the_textbooks(rho, tau):
    law, rho, tau = theory.scaled_inv_chi2(rho, tau), mp.mpf(rho), mp.mpf(tau)
    for x in (0.5, 1.0, 2.0):
        x = mp.mpf(x) * tau**2
        truth = (
            (tau**2 * rho / 2) ** (rho / 2) / mp.gamma(rho / 2)
            * mp.exp(-rho * tau**2 / (2 * x)) / x ** (1 + rho / 2)
        )  # fmt: skip
        assert law.pdf(float(x)) == pytest.approx(float(truth), rel=1e-9)


def test_it_is_the_law_of_the_inverse_mean_square_of_gradients(generator):
    gradients = 3.0 * generator.standard_normal((20_000, 7))
    found = 7 / (gradients**2).sum(axis=1)
    assert stats.kstest(found, theory.scaled_inv_chi2(7, tau=1 / 3).cdf).pvalue > 1e-3
    assert stats.kstest(found, theory.scaled_inv_chi2(7, tau=1 / 2).cdf).pvalue < 1e-9


@by_rho
@pytest.mark.parametrize("tau", [1.0, 0.1])
def test_mean_and_variance_of_psi_are_the_papers(rho, tau):
    r, t = mp.mpf(rho), mp.mpf(tau)
    beta_function = mp.exp(2 * mp.loggamma((r - 1) / 2) - mp.loggamma(r - 1))
    variance = r / (r - 2) - r * mp.mpf(2) ** (2 * r - 5) / mp.pi * beta_function**2
    mean = mp.sqrt(r / (r - 2) - variance)  # E psi^2 is r / (r - 2)
    assert theory.psi_mean(rho, tau) == pytest.approx(float(t * mean), rel=1e-12)
    assert theory.psi_variance(rho, tau) == pytest.approx(float(t**2 * variance), rel=1e-12)


@pytest.mark.parametrize("rho", [5.0, 10.0, 100.0])
def test_mean_and_variance_of_psi_are_those_of_draws(rho, generator):
    s = 4.0
    psi = np.sqrt(
        theory.scaled_inv_chi2(rho, 1 / s).rvs((20, CHAINS // 20), random_state=generator)
    )
    mean, variance = mean_interval(psi.mean(axis=1)), mean_interval(psi.var(axis=1, ddof=1))
    assert abs(mean.mean - theory.psi_mean(rho, 1 / s)) < 2 * mean.half
    assert abs(variance.mean - theory.psi_variance(rho, 1 / s)) < 2 * variance.half


def test_the_variance_falls_to_its_least_at_rho_inf():
    variances = [theory.psi_variance(schedule.rho(t, 0.999)) for t in range(3, 12_000, 7)]
    assert (np.diff(variances) < 0).all()
    assert variances[-1] == pytest.approx(theory.c_var(0.999), rel=1e-3)
    assert theory.c_var(0.999, tau=0.1) == pytest.approx(theory.psi_variance(1999) / 100)


def test_what_diverges_is_infinite():
    assert theory.psi_mean(1.0) == math.inf
    assert theory.psi_variance(2.0) == math.inf
    assert theory.psi_variance(schedule.rho(1, 0.999)) == math.inf
    assert theory.psi_variance_first_order(4.0) == math.inf
    assert theory.c_var(1 / 3) == math.inf
    assert theory.ema_psi_variance(2, 0.999) == math.inf


@pytest.mark.parametrize(
    ("rho", "ratio"), [(5.0, 3.307), (5.1, 3.096), (10.0, 1.379), (100.0, 1.0235), (1999.0, 1.0011)]
)
def test_first_order_is_off_by_as_much_as_we_say(rho, ratio):
    s = 3.0
    first = theory.psi_variance_first_order(rho, s)
    assert first == pytest.approx(rho / (2 * (rho - 2) * (rho - 4) * s**2), rel=1e-14)
    assert first / theory.psi_variance(rho, 1 / s) == pytest.approx(ratio, abs=6e-4)


# the variance of Adam's own psi


@pytest.mark.parametrize("step", [3, 5, 10, 100, 1000])
def test_equal_weights_have_the_exact_variance_of_the_paper(step):
    assert theory.ema_psi_variance(step, 1 - 1e-12) == pytest.approx(
        theory.psi_variance(step), rel=1e-7
    )


@pytest.mark.parametrize("mean", [0.0, 1.0])
@pytest.mark.parametrize(("step", "beta2"), [(5, 0.99), (30, 0.9), (200, 0.99)])
def test_the_integral_is_the_variance_of_simulated_chains(step, beta2, mean, generator):
    batches = [
        next(simulate_psi(generator, beta2, mean, CHAINS // 40, [step])).var(ddof=1)
        for _ in range(20)
    ]
    found = mean_interval(batches)
    assert abs(found.mean - theory.ema_psi_variance(step, beta2, mean)) < 2 * found.half
    assert found.half < 0.1 * found.mean


def test_simulated_psi_is_algorithm_1s():
    steps, beta2 = [1, 2, 7], 0.9
    found = list(simulate_psi(np.random.default_rng(5), beta2, 0.3, 4, steps))
    gradients = 0.3 + np.random.default_rng(5).standard_normal((7, 4))
    for step, psi in zip(steps, found, strict=True):
        w = (1 - beta2) * beta2 ** np.arange(step)[::-1]
        truth = np.sqrt((1 - beta2**step) / (w @ gradients[:step] ** 2))
        assert psi == pytest.approx(truth, rel=1e-12)


# intervals, warmup, toys


def test_an_interval_is_students():
    samples = np.array([[1.0, 10.0], [2.0, 30.0], [4.0, 20.0]])
    found = mean_interval(samples)
    low, high = stats.ttest_1samp(samples, 0.0).confidence_interval(0.95)
    assert found.mean - found.half == pytest.approx(low)
    assert found.mean + found.half == pytest.approx(high)
    with pytest.raises(ValueError, match="at least 2 for an interval, got 1"):
        mean_interval(samples[:1])


def test_the_nearest_warmup_has_no_better_neighbour():
    for row in fit(0.99):
        power = {"linear": 1.0, "root": 0.5}[row["shape"]]
        r = {t: schedule.rectification(t, 0.99, rho_threshold=4.0) for t in range(5, 1001)}
        steps, truth = np.array(list(r)), np.array(list(r.values()))
        best = row["nearest_T"]
        for length in (best, best * 0.98, best * 1.02):
            rms = np.sqrt(np.mean((warmup(steps, length, power) - truth) ** 2))
            assert rms >= row["rms"] - 1e-12
            assert (rms == pytest.approx(row["rms"])) == (length == best)


def test_momentums_first_loss_is_half_of_lr_s_squared():
    assert momentum_loss(3.0, 1) == pytest.approx(0.5 * (0.01 * 3.0) ** 2)


def test_radams_way_is_the_sum_of_r_t():
    way = distances("RAdam", 400)
    assert way[4] == pytest.approx(0.05)
    assert way[5] - way[4] == pytest.approx(schedule.rectification(6, 0.999))
    step = steps_to("RAdam", 100.0, 400)
    assert way[step - 2] < 100.0 <= way[step - 1]
    assert steps_to("Adam", 100.0, 400) == 100
