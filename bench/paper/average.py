"""The step from a simple to an exponential moving average, on which rho_t rests, simulated."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy import stats

from radam_kernels.schedule import rho

from . import style, theory
from .experiment import Experiment, Row, Run, Verdict

BETA2S = (0.99, 0.999)
BATCH = 5000  # chains that stay in the cache
FITS = 0.01  # a distance that we call a fit: no probability is off by more than 1%


def recorded_steps(beta2: float, points: int) -> list[int]:
    """From step 5, the first with rho_t > 4 , to six times the memory 1 / (1 - beta2)."""
    return sorted({round(step) for step in np.geomspace(5, 6 / (1 - beta2), points)})


def simulate_averages(
    generator: np.random.Generator, beta2: float, chains: int, lengths: dict[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """psi^2 of the exponential average and of the simple one, each (steps, chains), from N(0, 1).

    `lengths` has the steps to look at, and how many of the last squares the simple average takes.
    """
    ema, total = np.zeros(chains), np.zeros(chains)
    starts = {step - length for step, length in lengths.items()}
    totals = {0: total.copy()}
    exponential, simple = [], []
    for step in range(1, max(lengths) + 1):
        square = generator.standard_normal(chains) ** 2
        ema = beta2 * ema + (1 - beta2) * square
        total = total + square
        if step in starts:
            totals[step] = total
        if length := lengths.get(step):
            exponential.append((1 - beta2**step) / ema)
            simple.append(length / (total - totals[step - length]))
    return np.array(exponential), np.array(simple)


def distances(beta2: float, chains: int, points: int, seed: int) -> list[Row]:
    """Kolmogorov's distance of both averages' psi^2 from Scale-inv-chi^2(rho_t, 1) over t.

    Also of the exponential one's from the distribution for the length of equal variance.
    """
    generator = np.random.default_rng(seed)
    lengths = {step: round(rho(step, beta2)) for step in recorded_steps(beta2, points)}
    batches = [simulate_averages(generator, beta2, BATCH, lengths) for _ in range(chains // BATCH)]
    exponential, simple = (np.concatenate(parts, axis=1) for parts in zip(*batches, strict=True))
    rows = []
    for step, ema, sma in zip(lengths, exponential, simple, strict=True):
        length, other = rho(step, beta2), theory.equal_variance_length(step, beta2)
        by_mass, by_variance = (theory.scaled_inv_chi2(r).cdf for r in (length, other))
        rows.append(
            {
                "beta2": beta2,
                "step": step,
                "chains": ema.size,
                "rho": length,
                "equal_variance_length": other,
                "ema": stats.kstest(ema, by_mass).statistic,
                "sma": stats.kstest(sma, by_mass).statistic,
                "ema_equal_variance": stats.kstest(ema, by_variance).statistic,
            }
        )
    return rows


def half_width(chains: int) -> float:
    """Of a 95% interval around a measured distance (Dvoretzky, Kiefer, Wolfowitz; Massart)."""
    return math.sqrt(math.log(2 / 0.05) / (2 * chains))


def runs(quick: bool) -> list[Run]:
    chains, points, beta2s = (5_000, 8, BETA2S[:1]) if quick else (200_000, 30, BETA2S)
    return [
        Run(f"beta2={b}", distances, {"beta2": b, "chains": chains, "points": points, "seed": seed})
        for seed, b in enumerate(beta2s)
    ]


def judge(rows: pd.DataFrame, quick: bool) -> list[Verdict]:
    half = half_width(rows["chains"].min())
    of = rows[rows["beta2"] == rows["beta2"].max()].set_index("step")
    beta2, worst = rows["beta2"].max(), of["ema"].idxmax()
    fitting = of.index[of["ema"] + half < FITS]
    told = ", ".join(map(str, (fitting.min(), fitting.max()))) if len(fitting) else "none"
    first, last = of.index[0], of.index[-1]
    gain = of.loc[worst, "equal_variance_length"] / of.loc[worst, "rho"] - 1
    return [
        Verdict(
            None if half > FITS / 2 else of["ema"].max() + half < FITS,
            f"The EMA's psi^2 follows Scale-inv-chi^2(rho_t) at all steps (beta2 = {beta2}): the "
            f"distance is {of.loc[first, 'ema']:.3f} at step {first}, {of.loc[worst, 'ema']:.3f} "
            f"at step {worst}, where it is largest, and {of.loc[last, 'ema']:.3f} at step {last} "
            f"(each ± {half:.3f}); first and last step surely below {FITS}: {told}.",
        ),
        Verdict(
            None if half > FITS else of["ema_equal_variance"].max() < of["ema"].max(),
            "A length of equal variance in place of equal centre of mass fits better: its largest "
            f"distance is {of['ema_equal_variance'].max():.3f}; at step {worst} it is {gain:.0%} "
            "longer.",
        ),
    ]


def draw(rows: pd.DataFrame) -> Figure:
    beta2s = sorted(rows["beta2"].unique())
    figure, axes = style.panels(len(beta2s), sharey=True)
    labels = {
        "ema": ("EMA, rho_t", style.BLUE),
        "ema_equal_variance": ("EMA, length of equal variance", style.ORANGE),
        "sma": ("SMA of round(rho_t), rho_t", style.BLACK),
    }
    for ax, beta2 in zip(axes, beta2s, strict=True):
        of = rows[rows["beta2"] == beta2]
        half = of["chains"].map(half_width)
        for name, (label, color) in labels.items():
            style.band(ax, of["step"], of[name], half, color=color, label=label)
        ax.set(xscale="log", xlabel="step t", title=f"beta2 = {beta2}", ylim=(0, None))
    axes[0].set_ylabel("Kolmogorov distance from Scale-inv-chi^2")
    style.legend(axes[0])
    return figure


EXPERIMENT = Experiment(
    name="average",
    title="From the simple to the exponential moving average",
    claim=(
        "psi^2 of the exponential moving average is well described by Scale-inv-chi^2 with rho_t "
        "degrees of freedom, which match its centre of mass (sections 4.1 and 5.4)."
    ),
    runs=runs,
    judge=judge,
    draw=draw,
)
