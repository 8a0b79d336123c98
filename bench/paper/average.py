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
    """From step 5, the first with rho_t > 4, to six times the memory 1 / (1 - beta2)."""
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
    beta2, half = rows["beta2"].max(), half_width(rows["chains"].min())
    of = rows[rows["beta2"] == beta2].set_index("step")
    worst, first, last = of["ema"].idxmax(), of.index[0], of.index[-1]
    off = of.index[of["ema"] - half > FITS]
    where = f", and surely above {FITS} from step {off[0]} to {off[-1]}" if len(off) else ""
    gain = of.loc[worst, "equal_variance_length"] / of.loc[worst, "rho"] - 1
    told = {
        step: f"{of.loc[step, 'ema']:.3f} at step {step} (rho_t = {of.loc[step, 'rho']:.0f})"
        for step in (first, worst, last)
    }
    return [
        Verdict(
            None if half > FITS / 2 else not len(off),
            f"It fits to {FITS} (no probability is off by more) at all steps: for beta2 = {beta2} "
            f"the distance is {told[first]}, {told[last]}, but {told[worst]}, where it is "
            f"largest (each ± {half:.3f}){where}.",
        ),
        Verdict(
            None if half > FITS / 2 else of["ema_equal_variance"].max() + half < FITS,
            "Averages of equal variance in place of equal centre of mass (not in the paper) fit to "
            f"{FITS} at all steps: the distance is at most {of['ema_equal_variance'].max():.3f}; "
            f"at step {worst} that length is {gain:.0%} above rho_t.",
        ),
    ]


def draw(rows: pd.DataFrame) -> Figure:
    beta2s = sorted(rows["beta2"].unique())
    figure, axes = style.panels(len(beta2s), sharey=True)
    for ax, beta2 in zip(axes, beta2s, strict=True):
        of = rows[rows["beta2"] == beta2]
        half = of["chains"].map(half_width)
        style.band(ax, of["step"], of["ema"], half, color=style.BLUE, label="EMA, rho_t")
        for name, label, color in (
            ("ema_equal_variance", "EMA, length of equal variance", style.ORANGE),
            ("sma", "SMA of round(rho_t), rho_t", style.BLACK),
        ):
            ax.plot(of["step"], of[name], color=color, lw=1.4, label=label)
        ax.axhspan(0, half.max(), color="#777777", alpha=0.15, lw=0, label="below resolution")
        ax.set(xscale="log", xlabel="step t", title=f"beta2 = {beta2}", ylim=(0, None))
    axes[0].set_ylabel("Kolmogorov distance")
    style.legend(axes[-1], loc="upper left")
    return figure


EXPERIMENT = Experiment(
    name="average",
    title="From the simple to the exponential moving average",
    claim=(
        "psi^2 of the exponential moving average is well described by Scale-inv-chi^2 with rho_t "
        "degrees of freedom, which match its centre of mass (section 4.1)."
    ),
    runs=runs,
    judge=judge,
    draw=draw,
)
