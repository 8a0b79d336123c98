"""The formulas of bench/paper against their definitions and against Monte Carlo."""

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="bench/paper needs pip install -e '.[paper]'")
from scipy import stats

from bench.paper.experiments import theory
from bench.paper.experiments.noise import momentum_loss
from bench.paper.experiments.travel import predicted_distances, predicted_steps
from bench.paper.experiments.variance import simulate_psi
from bench.paper.experiments.warmup import SHAPES, fit, rectifications, warmup
from bench.paper.harness.statistics import Mean, mean_interval
from radam_kernels import schedule


@pytest.mark.parametrize("beta2", [0.0, 0.5, 0.99, 0.999])
@pytest.mark.parametrize("step", [1, 5, 40, 1000])
def test_weights_and_lengths_are_those_of_the_moving_average(step, beta2):
    w = theory.ema_weights(step, beta2)
    assert w.sum() == pytest.approx(1.0, rel=1e-12)
    assert w[1:] == pytest.approx(beta2 * w[:-1], rel=1e-12)
    assert theory.equal_variance_length(step, beta2) == pytest.approx(1 / (w @ w), rel=1e-9)
    # The center of mass of the last f squares is (f + 1) / 2.
    center = w @ np.arange(1, step + 1)
    assert schedule.rho(step, beta2) == pytest.approx(2 * center - 1, rel=1e-9)


def test_psi_squared_has_the_distribution_of_the_paper():
    generator = np.random.default_rng(0)
    for rho in (3, 20):
        psi_squared = rho / (generator.standard_normal((20_000, rho)) ** 2).sum(axis=1)
        assert stats.kstest(psi_squared, theory.scaled_inv_chi2(rho).cdf).pvalue > 1e-3
        assert stats.kstest(psi_squared, theory.scaled_inv_chi2(1.2 * rho).cdf).pvalue < 1e-9


@pytest.mark.parametrize("step", [2, 3, 5, 10, 100, 1000])
def test_equal_weights_have_the_exact_variance_of_the_paper(step):
    variance = theory.ema_psi_variance(step, 1 - 1e-12)
    assert variance == pytest.approx(schedule.adaptive_variance(step), rel=1e-7)


@pytest.mark.parametrize("mean", [0.0, 1.0])
@pytest.mark.parametrize(("step", "beta2"), [(5, 0.99), (30, 0.9), (200, 0.99)])
def test_the_integral_is_the_variance_of_simulated_chains(step, beta2, mean):
    generator = np.random.default_rng(0)
    batches = [next(simulate_psi(generator, beta2, mean, 5_000, [step])) for _ in range(20)]
    found = mean_interval([psi.var(ddof=1) for psi in batches])
    assert abs(found.mean - theory.ema_psi_variance(step, beta2, mean)) < 2 * found.half
    assert found.half < 0.1 * found.mean


def test_simulated_psi_is_that_of_algorithm_1():
    steps, beta2 = [1, 2, 7], 0.9
    found = list(simulate_psi(np.random.default_rng(5), beta2, 0.3, 4, steps))
    gradients = 0.3 + np.random.default_rng(5).standard_normal((7, 4))
    for step, psi in zip(steps, found, strict=True):
        mean_square = theory.ema_weights(step, beta2) @ gradients[:step][::-1] ** 2
        assert psi == pytest.approx(mean_square**-0.5, rel=1e-12)


def test_an_interval_is_students():
    samples = np.array([[1.0, 10.0], [2.0, 30.0], [4.0, 20.0]])
    found = mean_interval(samples)
    low, high = stats.ttest_1samp(samples, 0.0).confidence_interval(0.95)
    assert [*(found.mean - found.half), *(found.mean + found.half)] == pytest.approx([*low, *high])
    with pytest.raises(ValueError, match="at least 2 for an interval, got 1"):
        mean_interval(samples[:1])


def test_a_sign_is_known_where_the_interval_excludes_0():
    means = [Mean(mean, 2.0) for mean in (3.0, -3.0, 1.0, -2.0)]
    assert [mean.is_positive() for mean in means] == [True, False, None, None]
    assert [mean.is_negative() for mean in means] == [False, True, None, None]
    assert [f"{mean:+.1f}" for mean in means[:2]] == ["+3.0 ± 2.0", "-3.0 ± 2.0"]


def test_the_nearest_warmup_has_no_better_neighbour():
    steps, r = rectifications(0.99)
    for row in fit(0.99):
        for factor in (0.98, 1.0, 1.02):
            y = warmup(steps, factor * row["nearest_T"], SHAPES[row["shape"]])
            rms = np.sqrt(np.mean((y - r) ** 2))
            assert (rms == pytest.approx(row["rms"])) == (factor == 1.0)
            assert rms >= row["rms"] - 1e-12


def test_momentums_first_loss_is_half_of_lr_s_squared():
    assert momentum_loss(3.0, 1) == pytest.approx(0.5 * (0.01 * 3.0) ** 2)


def test_radams_predicted_distance_is_the_sum_of_r_t():
    distance = predicted_distances("RAdam", 400)
    assert distance[4] == pytest.approx(0.05)
    assert distance[5] - distance[4] == pytest.approx(schedule.rectification(6, 0.999))
    step = predicted_steps("RAdam", 100.0, 400)
    assert distance[step - 2] < 100.0 <= distance[step - 1]
    assert predicted_steps("Adam", 100.0, 400) == 100
