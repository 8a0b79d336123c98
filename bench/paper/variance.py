"""The variance of the adaptive rate with and without r_t, simulated (the paper's Fig. 9)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from radam_kernels.schedule import rectification

from . import style, theory
from .experiment import Experiment, Row, Run, Verdict
from .intervals import mean_interval

MEANS = (0.0, 0.001, 0.01, 0.1, 1.0)  # of the gradients, whose standard deviation is 1
BETA2S = (0.99, 0.999)
BATCHES = 20
FIRST = 5  # the paper's first rectified step; before it psi has no finite fourth moment
CONSTANT = 0.15  # how far from C_var we still call a variance constant


def recorded_steps(beta2: float, points: int, horizon: float) -> list[int]:
    """Steps from FIRST to `horizon` times the memory 1 / (1 - beta2), evenly on a log scale."""
    return sorted({round(step) for step in np.geomspace(FIRST, horizon / (1 - beta2), points)})


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
    """Var[psi_t] with a 95% interval from batches of chains, the truth, and both forms of r_t."""
    steps = recorded_steps(beta2, points, horizon)
    generator = np.random.default_rng(seed)
    batches = [
        [psi.var(ddof=1) for psi in simulate_psi(generator, beta2, mean, chains // BATCHES, steps)]
        for _ in range(BATCHES)
    ]
    measured = mean_interval(batches)
    return [
        {
            "beta2": beta2,
            "mean": mean,
            "chains": chains,
            "step": step,
            "variance": measured.mean[i],
            "half": measured.half[i],
            "true_variance": theory.ema_psi_variance(step, beta2, mean),
            "r_first_order": rectification(step, beta2, rho_threshold=4.0),
            "r_exact": rectification(step, beta2, form="exact", rho_threshold=4.0),
        }
        for i, step in enumerate(steps)
    ]


def runs(quick: bool) -> list[Run]:
    size = {"chains": 10_000, "points": 12, "horizon": 1.0} if quick else FULL
    means, beta2s = (MEANS[::4], BETA2S[:1]) if quick else (MEANS, BETA2S)
    plans = [(beta2, mean) for beta2 in beta2s for mean in means]
    return [
        Run(f"beta2={b}-mean={m}", simulate, {"beta2": b, "mean": m, "seed": seed, **size})
        for seed, (b, m) in enumerate(plans)
    ]


FULL = {"chains": 200_000, "points": 40, "horizon": 6.0}


def rectified(rows: pd.DataFrame, form: str) -> pd.Series:
    """Var[r_t psi_t] as a multiple of C_var, the variance that r_t aims at."""
    aim = rows["beta2"].map(theory.c_var)
    return rows[f"r_{form}"] ** 2 * rows["variance"] / aim


def judge(rows: pd.DataFrame, quick: bool) -> list[Verdict]:
    rows = rows.assign(first=rectified(rows, "first_order"), exact=rectified(rows, "exact"))
    zero = rows[(rows["mean"] == 0) & (rows["beta2"] == rows["beta2"].max())].set_index("step")
    beta2, ratio = zero["beta2"].max(), zero["first"]
    early = zero["variance"].iloc[0] / theory.c_var(beta2)
    settled = ratio[ratio >= 1 - CONSTANT]
    dip = settled.index[settled.diff() < 0].min()
    low = settled[settled.index >= dip] if dip == dip else settled
    inside = (rows["variance"] - rows["true_variance"]).abs() <= rows["half"]
    biased = rows.loc[rows["mean"] == 1.0, "first"]
    near = rows.loc[rows["mean"] <= 0.1, "first"]
    return [
        Verdict(
            near.max() < 1 + CONSTANT and early > 10,
            f"Not above C_var: at step {FIRST} (beta2 = {beta2}, mean 0) Var[psi] is {early:.3g} "
            f"times C_var; with r_t it is at most {near.max():.2f} times C_var, at any mean up to "
            "0.1.",
        ),
        Verdict(
            ratio.between(1 - CONSTANT, 1 + CONSTANT).all(),
            f"Constant to {CONSTANT:.0%} with the paper's r_t: {ratio.iloc[0]:.2f} times C_var at "
            f"step {FIRST}, above {1 - CONSTANT:.2f} from step {settled.index.min()} on, and then "
            f"{low.min():.2f} at step {low.idxmin()} again, where rho_t is furthest off.",
        ),
        Verdict(
            zero["exact"].between(1 - CONSTANT, 1 + CONSTANT).all(),
            f"Constant to {CONSTANT:.0%} with exact r_t: {zero['exact'].min():.2f} to "
            f"{zero['exact'].max():.2f} times C_var.",
        ),
        Verdict(
            biased.between(1 - CONSTANT, 1 + CONSTANT).all(),
            "The same where the mean is as large as the standard deviation: such gradients vary "
            f"less in size, and r_t overdoes it: {biased.min():.2f} to {biased.max():.2f} times "
            "C_var.",
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
    figure, axes = style.panels(len(beta2s), sharey=True)
    for ax, beta2 in zip(axes, beta2s, strict=True):
        for color, (mean, of) in zip(
            style.CYCLE, rows[rows["beta2"] == beta2].groupby("mean"), strict=False
        ):
            style.band(ax, of["step"], of["variance"], of["half"], color=color, label=f"{mean:g}")
            for form, dashes in (("first_order", "--"), ("exact", ":")):
                square = of[f"r_{form}"] ** 2
                style.band(
                    ax, of["step"], square * of["variance"], square * of["half"],
                    color=color, ls=dashes,
                )  # fmt: skip
        ax.axhline(theory.c_var(beta2), color="#777777", lw=1)
        ax.text(
            1, theory.c_var(beta2), "C_var", transform=ax.get_yaxis_transform(),
            ha="right", va="bottom", fontsize=8.5, color="#555555",
        )  # fmt: skip
        ax.set(xscale="log", yscale="log", xlabel="step t", title=f"beta2 = {beta2}")
    axes[0].set_ylabel("Var[psi_t]; dashed: with r_t, dotted: exact r_t")
    style.legend(axes[0], title="mean of the gradients")
    return figure


EXPERIMENT = Experiment(
    name="variance",
    title="The variance of the adaptive rate, with and without r_t",
    claim=(
        "Rectification brings the variance of the adaptive rate, large in the first steps, down to "
        "a constant, also where the gradients' mean is not zero (section 5.4, Fig. 9)."
    ),
    runs=runs,
    judge=judge,
    draw=draw,
)
