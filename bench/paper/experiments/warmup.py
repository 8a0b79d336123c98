"""r_t beside the warmup that it explains, and the warmup length T that fits best."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy import optimize

from radam_kernels.schedule import rectification

from ..harness import plots
from ..harness.experiment import Row, Run, Verdict

TITLE = "Warmup, explained"
CLAIM = (
    "r_t has a similar form to a linear warmup, min(t, T) / T, which would explain why warmup "
    "helps (section 4.3)."
)
BETA2S = (0.9, 0.98, 0.99, 0.999, 0.9999)
SHAPES = {"linear": 1.0, "root": 0.5}  # min(1, t / T) to these powers
HORIZON = 10  # in units of 1 / (1 - beta2); all but 1e-3 of r_t's rise
SHOWN = (500, 1000, 2000, 4000, 8000)  # warmups drawn beside r_t of beta2 = 0.999
NEAR = 0.05  # a root mean square distance that we call near


def rectifications(beta2: float) -> tuple[np.ndarray, np.ndarray]:
    """The rectified steps up to the horizon, and r_t at each."""
    last = round(HORIZON / (1 - beta2))
    r = {t: rectification(t, beta2, rho_threshold=4.0) for t in range(1, last + 1)}
    rectified = {t: value for t, value in r.items() if value is not None}
    return np.array(list(rectified)), np.array(list(rectified.values()))


def warmup(steps: np.ndarray, length: float, power: float = 1.0) -> np.ndarray:
    """`min(t, T) / T`, to a power."""
    return np.minimum(steps / length, 1.0) ** power


def fit(beta2: float) -> list[Row]:
    """The least-squares T of each shape, and the remaining distance."""
    steps, r = rectifications(beta2)
    rows = []

    def squares(log_length: float, power: float) -> float:
        return np.mean((warmup(steps, np.exp(log_length), power) - r) ** 2)

    for shape, power in SHAPES.items():
        bounds = 0.0, np.log(steps[-1])
        found = optimize.minimize_scalar(squares, args=(power,), bounds=bounds, method="bounded")
        length = float(np.exp(found.x))
        gap = warmup(steps, length, power) - r
        rows.append(
            {
                "beta2": beta2,
                "shape": shape,
                "nearest_T": length,
                "T_in_memories": length * (1 - beta2),
                "rms": float(found.fun**0.5),
                "largest_gap": float(np.abs(gap).max()),
                "at_step": int(steps[np.abs(gap).argmax()]),
            }
        )
    return rows


def runs(quick: bool) -> list[Run]:
    return [Run(fit, {"beta2": beta2}) for beta2 in (BETA2S[:-1] if quick else BETA2S)]


def judge(rows: pd.DataFrame, quick: bool) -> list[Verdict]:
    linear, root = (rows[rows["shape"] == shape].set_index("beta2") for shape in SHAPES)
    usual = linear.loc[0.999]
    long_memory = linear[linear.index >= 0.99]["T_in_memories"]
    return [
        Verdict(
            linear["rms"].max() < NEAR,
            f"A linear warmup of the right length is near (to {NEAR}): at beta2 = 0.999 the "
            f"nearest is T = {usual['nearest_T']:.0f}, at a root mean square distance of "
            f"{usual['rms']:.3f} over {HORIZON}/(1 - beta2) steps, at most "
            f"{usual['largest_gap']:.2f} (step {usual['at_step']:.0f}); over all beta2 at most "
            f"{linear['rms'].max():.3f}.",
        ),
        Verdict(
            long_memory.max() / long_memory.min() < 1.1,
            "One rule of thumb serves every beta2: for beta2 >= 0.99 the nearest T is "
            f"{long_memory.min():.2f} to {long_memory.max():.2f} times 1/(1 - beta2).",
        ),
        Verdict(
            (linear["rms"] < root["rms"]).all(),
            "Linear is the nearer shape: r_t rises as the root of t at first, and "
            f"min(1, t/T)^0.5 with T = {root.loc[0.999, 'nearest_T']:.0f} is at "
            f"{root.loc[0.999, 'rms']:.3f}.",
        ),
    ]


def table(rows: pd.DataFrame) -> pd.DataFrame:
    names = ("nearest T", "T (1 - beta2)", "rms distance", "largest gap", "at step")
    return rows.set_axis(["beta2", "shape", *names], axis="columns")


def draw(rows: pd.DataFrame) -> Figure:
    figure, (left, right) = plots.panels(2)
    steps, r = rectifications(0.999)
    for length, color in zip(SHOWN, plots.CYCLE, strict=False):
        left.plot(steps, warmup(steps, length), color=color, lw=1, label=f"T = {length}")
    left.plot(steps, r, color=plots.BLACK, lw=2, label="r_t")
    left.set(xlabel="step t", title="beta2 = 0.999: r_t and min(t, T) / T")
    left.legend()
    for beta2, color in zip(BETA2S, plots.CYCLE, strict=False):
        steps, r = rectifications(beta2)
        right.plot(steps * (1 - beta2), r, color=color, lw=1.4, label=f"r_t, beta2 = {beta2}")
    nearest = rows[rows["beta2"] == 0.999].set_index("shape")["T_in_memories"]
    x = np.linspace(0, HORIZON, 500)
    for (shape, power), dashes in zip(SHAPES.items(), ("--", ":"), strict=True):
        y = warmup(x, nearest[shape], power)
        label = f"{shape}, T = {nearest[shape]:.1f} / (1 - beta2)"
        right.plot(x, y, color=plots.GREY, ls=dashes, lw=2, label=label)
    right.set(xlabel="t (1 - beta2)", title="All beta2 beside the nearest warmups", xlim=(0, 6))
    right.legend()
    return figure
