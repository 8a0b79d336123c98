"""The paper's formulas that the optimizer does not need, and the exact values they approximate."""

import math

import numpy as np
from scipy import integrate, special, stats

from radam_kernels.schedule import rho_inf


def equal_variance_length(step: int, beta2: float) -> float:
    """Length of the simple moving average with the same variance: `1 / sum w_i^2`.

    `w_i = beta2^(t-i) (1 - beta2) / (1 - beta2^t)` is the weight of the i-th of t squares; the
    length is `rho_inf (1 - beta2^t) / (1 + beta2^t)`. At t = 1 and in the limit it equals the
    paper's rho_t, and it is larger between. Domain: step >= 1, 0 <= beta2 < 1. Source: ours.
    """
    power = beta2**step
    return rho_inf(beta2) * (1.0 - power) / (1.0 + power)


def scaled_inv_chi2(rho: float) -> stats.rv_continuous:
    """Distribution of psi^2: Scale-inv-chi^2(rho, 1), an inverse gamma distribution.

    Density `(rho/2)^(rho/2) / Gamma(rho/2) exp(-rho / (2 x)) / x^(1 + rho/2)`, x > 0. It is the
    distribution of `rho / sum g_i^2` for rho gradients from N(0, 1).
    Domain: rho > 0. Source: Liu et al., ICLR 2020, section 3.2, with tau = 1.
    """
    return stats.invgamma(rho / 2, scale=rho / 2)


def ema_weights(step: int, beta2: float) -> np.ndarray:
    """Weights of the squares in `1 / psi^2`, newest first; their sum is 1."""
    powers = beta2 ** np.arange(step)
    return powers / powers.sum()


def ema_psi_variance(step: int, beta2: float, mean: float = 0.0) -> float:
    """Variance of Adam's psi_t for gradients from N(mean, 1), by numerical integration.

    With `X = sum w_i g_i^2`, `E X^-p = 1/Gamma(p) int s^(p-1) E exp(-s X) ds`, and `E exp(-s X)` is
    the product of `(1 + 2 s w_i)^-1/2 exp(-s w_i mean^2 / (1 + 2 s w_i))`; psi is `X^-1/2`.
    With s = e^u the integrand is analytic and decays on both sides, so the trapezoidal rule is
    exact to rounding. math.inf for step <= 2.
    """
    if step <= 2:
        return math.inf
    u = np.arange(-90.0, 90.0, 0.2)
    sw = np.exp(u)[:, None] * ema_weights(step, beta2)
    log_laplace = (-0.5 * np.log1p(2 * sw) - mean**2 * sw / (1 + 2 * sw)).sum(axis=1)
    first, second = (
        integrate.trapezoid(np.exp(p * u + log_laplace), u) / special.gamma(p) for p in (0.5, 1.0)
    )
    return float(second - first**2)
