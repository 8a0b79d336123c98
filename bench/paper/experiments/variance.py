"""Simulates the variance of the adaptive rate, with and without r_t."""

from collections.abc import Iterator

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from radam_kernels.schedule import adaptive_variance, rectification, rho_inf

from ..harness import plots
from ..harness.experiment import Row, Run, Verdict
from ..harness.statistics import mean_interval
from . import theory
from .simulation import log_spaced_steps

TITLE = "The variance of the adaptive rate, with and without r_t"
CLAIM = (
    "Rectification brings the variance of the adaptive rate, large in the first steps, down to "
    "a constant, also where the gradients' mean is not zero (Fig. 9)."
)
MEANS = (0.0, 0.001, 0.01, 0.1, 1.0)  # of the gradients; their standard deviation is 1
BETA2S = (0.99, 0.999)
BATCHES = 20
FIRST = 5  # the paper's first rectified step; before it psi has no finite fourth moment
END = 12  # in units of 1 / (1 - beta2); by then a variance is within 1e-5 of its limit
CONSTANT = 0.15  # relative distance from the limit that we still call constant
FULL = {"chains": 200_000, "points": 40, "horizon": 6.0}


def simulate_psi(
    generator: np.random.Generator, beta2: float, mean: float, chains: int, steps: list[int]
) -> Iterator[np.ndarray]:
    """Adam's psi of independent chains of gradients from N(mean, 1), at each of `steps`."""
    average = np.zeros(chains)
    wanted = set(steps)
    for step in range(1, max(steps) + 1):
        gradient = generator.standard_normal(chains)
        gradient += mean
        gradient *= gradient
        gradient *= 1 - beta2
        average *= beta2
        average += gradient
        if step in wanted:
            yield np.sqrt((1 - beta2**step) / average)


def simulate(
    beta2: float, mean: float, chains: int, points: int, horizon: float, seed: int
) -> list[Row]:
    """Var[psi_t] with a 95% interval from batches of chains, its exact value, and both r_t.

    The last step is `horizon` times the memory 1 / (1 - beta2).
    """
    steps = log_spaced_steps(FIRST, horizon / (1 - beta2), points)
    generator = np.random.default_rng(seed)
    batches = [
        [psi.var(ddof=1) for psi in simulate_psi(generator, beta2, mean, chains // BATCHES, steps)]
        for _ in range(BATCHES)
    ]
    measured = mean_interval(batches)
    limit = theory.ema_psi_variance(round(END / (1 - beta2)), beta2, mean)
    return [
        {
            "beta2": beta2,
            "mean": mean,
            "chains": chains,
            "step": step,
            "variance": measured.mean[i],
            "half": measured.half[i],
            "limit": limit,
            "true_variance": theory.ema_psi_variance(step, beta2, mean),
            "r_first_order": rectification(step, beta2, rho_threshold=4.0),
            "r_exact": rectification(step, beta2, form="exact", rho_threshold=4.0),
        }
        for i, step in enumerate(steps)
    ]


def runs(quick: bool) -> list[Run]:
    size = {"chains": 10_000, "points": 12, "horizon": 1.0} if quick else FULL
    means, beta2s = (MEANS[::4], BETA2S[:1]) if quick else (MEANS, BETA2S)
    plans = [{"beta2": beta2, "mean": mean} for beta2 in beta2s for mean in means]
    return [Run(simulate, {**plan, "seed": seed, **size}) for seed, plan in enumerate(plans)]


def rectified(rows: pd.DataFrame, form: str) -> tuple[pd.Series, pd.Series]:
    """Var[r_t psi_t] relative to the limit of Var[psi_t], and half its interval."""
    factor = rows[f"r_{form}"] ** 2 / rows["limit"]
    return factor * rows["variance"], factor * rows["half"]


def is_constant(ratio: pd.Series, half: pd.Series) -> bool:
    """Whether every interval overlaps with the range that we call constant."""
    return not ((ratio - half > 1 + CONSTANT) | (ratio + half < 1 - CONSTANT)).any()


def judge(rows: pd.DataFrame, quick: bool) -> list[Verdict]:
    zero = rows[(rows["mean"] == 0) & (rows["beta2"] == rows["beta2"].max())].set_index("step")
    beta2, early = zero["beta2"].max(), zero["variance"] / zero["limit"]
    paper, paper_half = rectified(rows, "first_order")
    exact, exact_half = rectified(rows, "exact")
    ratio = rectified(zero, "first_order")[0]
    settled = ratio[ratio >= 1 - CONSTANT]
    inside = (rows["variance"] - rows["true_variance"]).abs() <= rows["half"]
    return [
        Verdict(
            (paper - paper_half).max() < 1 + CONSTANT and early.iloc[0] > 10,
            f"Never much above the variance in the end: at step {FIRST} Var[psi] is "
            f"{early.iloc[0]:.0f} times as large (beta2 = {beta2}, mean 0); with r_t it is at most "
            f"{paper.max():.2f} times as large, at any step, mean and beta2.",
        ),
        Verdict(
            is_constant(paper, paper_half),
            f"Constant to {CONSTANT:.0%} with the paper's r_t: it is {ratio.iloc[0]:.2f} times the "
            f"variance in the end at step {FIRST}, and above {1 - CONSTANT:.2f} of it from step "
            f"{settled.index.min()} on (beta2 = {beta2}, mean 0).",
        ),
        Verdict(
            is_constant(exact, exact_half),
            f"Constant to {CONSTANT:.0%} with exact r_t: {exact.min():.2f} to {exact.max():.2f} "
            "times the variance in the end, at any step, mean and beta2.",
        ),
        Verdict(
            inside.mean() > 0.85,
            f"The simulation can be trusted: {inside.mean():.0%} of its 95% intervals (Student's t "
            f"over {BATCHES} batches, {rows['chains'].max():,} chains) hold the variance that "
            "numerical integration gives.",
        ),
    ]


def draw(rows: pd.DataFrame) -> Figure:
    beta2s = sorted(rows["beta2"].unique())
    figure, axes = plots.panels(len(beta2s), 2, height=2.9, sharex="col", sharey="row")
    for above, below, beta2 in zip(axes, axes[len(beta2s) :], beta2s, strict=False):
        means = rows[rows["beta2"] == beta2].groupby("mean")
        for color, (mean, at) in zip(plots.CYCLE, means, strict=False):
            step, limit = at["step"], at["limit"]
            measured, ratio = (at["variance"], at["half"]), rectified(at, "first_order")
            variance = ratio[0] * limit, ratio[1] * limit
            plots.band(above, step, measured, color=color, label=f"{mean:g}")
            plots.band(above, step, variance, color=color, ls="--")
            plots.band(below, step, ratio, color=color, ls="--")
            plots.band(below, step, rectified(at, "exact"), color=color, ls=":")
        c_var = adaptive_variance(rho_inf(beta2))  # the variance that r_t aims at
        above.axhline(c_var, color=plots.GREY, lw=1)
        at_right = {"transform": above.get_yaxis_transform(), "ha": "right", "va": "bottom"}
        above.text(1, c_var, "C_var", fontsize=8.5, color="#555555", **at_right)
        below.axhline(1, color=plots.GREY, lw=1)
        above.set(xscale="log", yscale="log", title=f"beta2 = {beta2}")
        below.set(xlabel="step t", ylim=(0, None))
    axes[0].set_ylabel("Var[psi_t]\ndashed: Var[r_t psi_t]")
    axes[len(beta2s)].set_ylabel("Var[r_t psi_t] / Var in the end\ndotted: exact r_t")
    axes[len(beta2s) - 1].legend(title="mean (up to 0.1 they coincide)", title_fontsize=8.5)
    return figure
