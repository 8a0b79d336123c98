"""The distribution of psi^2 of the exponential moving average, against that assumed for rho_t."""

import math

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy import stats

from radam_kernels.schedule import rho

from ..harness import plots
from ..harness.experiment import Row, Run, Verdict
from . import theory
from .simulation import log_spaced_steps

TITLE = "From the simple to the exponential moving average"
CLAIM = (
    "psi^2 of the exponential moving average is well described by Scale-inv-chi^2 with rho_t "
    "degrees of freedom, which match its centre of mass (section 4.1)."
)
BETA2S = (0.99, 0.999)
BATCH = 5000  # chains that fit in the CPU's cache
FITS = 0.01  # a distance that we call a fit: no probability is off by more than 1%


def simulate_averages(
    generator: np.random.Generator, beta2: float, chains: int, lengths: dict[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """psi^2 of the exponential and of the simple average of squares of N(0, 1), (steps, chains).

    `lengths` maps each recorded step to the number of squares in the simple average.
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
    """Kolmogorov distances of psi^2 of both averages from Scale-inv-chi^2(rho_t, 1), over t.

    For the exponential average also the distance with the length of equal variance.
    """
    generator = np.random.default_rng(seed)
    # From the first step with rho_t > 4, to the limit.
    steps = log_spaced_steps(5, 6 / (1 - beta2), points)
    lengths = {step: round(rho(step, beta2)) for step in steps}
    batches = [simulate_averages(generator, beta2, BATCH, lengths) for _ in range(chains // BATCH)]
    exponential, simple = (np.concatenate(parts, axis=1) for parts in zip(*batches, strict=True))
    rows = []
    for step, ema, sma in zip(steps, exponential, simple, strict=True):
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
    """Of a 95% interval for a measured distance (Dvoretzky, Kiefer, Wolfowitz; Massart)."""
    return math.sqrt(math.log(2 / 0.05) / (2 * chains))


def runs(quick: bool) -> list[Run]:
    chains, points, beta2s = (5_000, 8, BETA2S[:1]) if quick else (200_000, 30, BETA2S)
    return [
        Run(distances, {"beta2": beta2, "chains": chains, "points": points, "seed": seed})
        for seed, beta2 in enumerate(beta2s)
    ]


def judge(rows: pd.DataFrame, quick: bool) -> list[Verdict]:
    beta2, half = rows["beta2"].max(), half_width(rows["chains"].min())
    at = rows[rows["beta2"] == beta2].set_index("step")
    first, worst, last = (
        f"{at.loc[step, 'ema']:.3f} at step {step} (rho_t = {at.loc[step, 'rho']:.0f})"
        for step in (at.index[0], at["ema"].idxmax(), at.index[-1])
    )
    off = at.index[at["ema"] - half > FITS]
    where = f", and surely above {FITS} from step {off[0]} to {off[-1]}" if len(off) else ""
    worst_step, distance = at["ema"].idxmax(), at["ema_equal_variance"].max()
    gain = at.loc[worst_step, "equal_variance_length"] / at.loc[worst_step, "rho"] - 1
    resolved = half <= FITS / 2
    return [
        Verdict(
            not len(off) if resolved else None,
            f"It fits to {FITS} (no probability is off by more) at all steps: for beta2 = {beta2} "
            f"the distance is {first}, {last}, but {worst}, where it is "
            f"largest (each ± {half:.3f}){where}.",
        ),
        Verdict(
            distance + half < FITS if resolved else None,
            "Averages of equal variance in place of equal centre of mass (not in the paper) fit to "
            f"{FITS} at all steps: the distance is at most {distance:.3f}; "
            f"at step {worst_step} that length is {gain:.0%} above rho_t.",
        ),
    ]


def draw(rows: pd.DataFrame) -> Figure:
    beta2s = sorted(rows["beta2"].unique())
    figure, axes = plots.panels(len(beta2s), sharey=True)
    for ax, beta2 in zip(axes, beta2s, strict=True):
        at = rows[rows["beta2"] == beta2]
        half = at["chains"].map(half_width)
        plots.band(ax, at["step"], (at["ema"], half), color=plots.BLUE, label="EMA, rho_t")
        for name, label, color in (
            ("ema_equal_variance", "EMA, length of equal variance", plots.ORANGE),
            ("sma", "SMA of round(rho_t), rho_t", plots.BLACK),
        ):
            ax.plot(at["step"], at[name], color=color, lw=1.4, label=label)
        ax.axhspan(0, half.max(), color=plots.GREY, alpha=0.15, lw=0, label="below resolution")
        ax.set(xscale="log", xlabel="step t", title=f"beta2 = {beta2}", ylim=(0, None))
    axes[0].set_ylabel("Kolmogorov distance")
    axes[-1].legend(loc="upper left")
    return figure
