"""The paper's formulas that the optimizer itself has no use for."""

from __future__ import annotations

import math

from scipy import stats

from radam_kernels.schedule import adaptive_variance, rho_inf


def center_of_mass(step: int, beta2: float) -> float:
    """How far back the exponential moving average looks: `sum w_i (t + 1 - i)`.

    `w_i = beta2^(t-i) (1 - beta2) / (1 - beta2^t)` is the weight of the i-th of t squares; the
    newest counts as 1. In closed form `1 / (1 - beta2) - t beta2^t / (1 - beta2^t)`.
    Domain: step >= 1, 0 <= beta2 < 1. Source: Liu et al., ICLR 2020, section 4.1.
    """
    power = beta2**step
    return 1.0 / (1.0 - beta2) - step * power / (1.0 - power)


def sma_length(step: int, beta2: float) -> float:
    """Length f(t, beta2) of the simple moving average with the same centre of mass.

    An average of the last f squares has its centre at `(f + 1) / 2`, so `f = 2 centre - 1`, which
    is `radam_kernels.schedule.rho`. Domain and source: as `center_of_mass`, whose textbook form
    cancels: use `schedule.rho` where digits matter.
    """
    return 2.0 * center_of_mass(step, beta2) - 1.0


def scaled_inv_chi2(rho: float, tau: float = 1.0) -> stats.rv_continuous:
    """Distribution of psi^2: Scale-inv-chi^2(rho, tau^2), an inverse gamma distribution.

    Density `(tau^2 rho / 2)^(rho/2) / Gamma(rho/2) exp(-rho tau^2 / (2 x)) / x^(1 + rho/2)`, x > 0.
    With rho gradients from N(0, s^2) it is the law of `rho / sum g_i^2` for `tau^2 = 1 / s^2`.
    Domain: rho > 0, tau > 0. Source: Liu et al., ICLR 2020, section 3.1 and appendix.
    """
    return stats.invgamma(rho / 2, scale=rho * tau**2 / 2)


def psi_mean(rho: float, tau: float = 1.0) -> float:
    """Mean of the adaptive rate: `tau sqrt(rho/2) Gamma((rho-1)/2) / Gamma(rho/2)`.

    math.inf for rho <= 1. Source: Liu et al., ICLR 2020, proof of Theorem 1.
    """
    if rho <= 1.0:
        return math.inf
    return tau * math.sqrt(rho / 2) * math.exp(math.lgamma((rho - 1) / 2) - math.lgamma(rho / 2))


def psi_variance(rho: float, tau: float = 1.0) -> float:
    """Variance of the adaptive rate: tau^2 times `schedule.adaptive_variance`.

    `tau^2 (rho/(rho-2) - rho 2^(2 rho - 5)/pi B((rho-1)/2, (rho-1)/2)^2)`, falling in rho;
    math.inf for rho <= 2. Source: Liu et al., ICLR 2020, Theorem 1.
    """
    return tau**2 * adaptive_variance(rho)


def c_var(beta2: float, tau: float = 1.0) -> float:
    """The least variance, which r_t makes that of every step: `Var[psi]` at rho_inf.

    math.inf for beta2 <= 1/3. Source: Liu et al., ICLR 2020, section 4.2.
    """
    return psi_variance(rho_inf(beta2), tau)
