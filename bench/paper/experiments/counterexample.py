"""The convex problems on which Adam does not converge (Reddi et al., 2018), and RAdam on them."""

from math import sqrt

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from scipy import stats

from ..harness import plots
from ..harness.experiment import Row, Run, Verdict
from ..harness.statistics import mean_interval
from .simulation import log_spaced_steps, trajectory

TITLE = "Toy 3: the problems on which Adam does not converge"
CLAIM = (
    "On the convex problems of Reddi et al. (ICLR 2018, sections 3 and 5) RAdam converges "
    "where rho_inf is too small to rectify, and fails as Adam does where it rectifies (ours)."
)
C = 3.0  # the slope of every third loss of the online problem; the others have -1
ONLINE_BETAS = (0.0, 1 / (1 + C**2))  # those of the proof of Reddi et al., for C > 2
RARE, OFTEN, CHANCE = 1010.0, -10.0, 0.01  # slopes of the stochastic problem; P(RARE)
STOCHASTIC_BETAS = (0.9, 0.99)
LR = 0.5  # divided by the square root of t
SLOPES = {  # means over the losses; positive, so that the best point of [-1, 1] is -1
    "online": (C - 2) / 3,
    "stochastic": CHANCE * RARE + (1 - CHANCE) * OFTEN,
}
OPTIMIZERS = ("Adam", "RAdam", "AMSGrad")


def regret_at(problem: str, x: float) -> float:
    """Average regret of staying at x, against the best point, -1."""
    return SLOPES[problem] * (x + 1)


def regrets(
    problem: str, optimizer: str, chains: int, steps: int, points: int, seed: int
) -> list[Row]:
    """Average regret up to some steps, and the position; means over chains from uniform starts.

    The regret of a step is computed with the slope of its loss in the online problem, and with the
    mean slope in the stochastic one, where it is the expected regret.
    """
    generator = np.random.default_rng(seed)
    online = problem == "online"

    def slope(t: int, x: torch.Tensor) -> torch.Tensor:
        if online:
            return torch.full_like(x, C if t % 3 == 1 else -1.0)
        rare = torch.from_numpy(generator.random(chains)) < CHANCE
        return torch.where(rare, RARE, OFTEN).to(x.dtype)

    recorded = log_spaced_steps(3, steps, points)
    start = torch.from_numpy(generator.uniform(-1, 1, chains))
    betas = ONLINE_BETAS if online else STOCHASTIC_BETAS
    path = trajectory(
        optimizer, start, slope, steps, lr=lambda t: LR / sqrt(t), bound=1.0, betas=betas
    )
    total, before = torch.zeros_like(start), start.clone()
    rows: list[Row] = []
    for t, x in enumerate(path, start=1):
        total += (slope(t, x) if online else SLOPES[problem]) * (before + 1)
        before.copy_(x)
        if t in recorded:
            regret, position = mean_interval((total / t).numpy()), mean_interval(x.numpy())
            of = {"problem": problem, "optimizer": optimizer, "chains": chains, "step": t}
            means = {"regret": regret.mean, "half": regret.half, "x": position.mean}
            rows.append({**of, **means, "x_half": position.half})
    return rows


def runs(quick: bool) -> list[Run]:
    steps = {"online": 300, "stochastic": 500} if quick else {"online": 3_000, "stochastic": 50_000}
    size = {"chains": 200, "points": 12} if quick else {"chains": 2_000, "points": 40}
    return [
        Run(regrets, {"problem": p, "optimizer": o, "steps": steps[p], "seed": seed, **size})
        for seed, p in enumerate(SLOPES)
        for o in OPTIMIZERS
    ]


def judge(rows: pd.DataFrame, quick: bool) -> list[Verdict]:
    last = rows.groupby(["problem", "optimizer"]).last()

    def end(problem: str, optimizer: str) -> str:
        at = last.loc[(problem, optimizer)]
        return (
            f"{optimizer} ends at x = {at['x']:+.3f} ± {at['x_half']:.3f} with an average regret "
            f"of {at['regret']:.3f} ± {at['half']:.3f}"
        )

    radam = rows[(rows["problem"] == "online") & (rows["optimizer"] == "RAdam")]
    radam = radam[radam["step"] >= 30]
    rate = stats.linregress(np.log(radam["step"]), np.log(radam["regret"]))
    stuck = last.loc[("stochastic", "RAdam"), "x"] > 0.9
    steps = rows.groupby("problem")["step"].max()
    return [
        Verdict(
            last.loc[("online", "Adam"), "x"] > 0.9 and last.loc[("online", "RAdam"), "x"] < -0.9,
            f"RAdam converges where Adam does not, with beta1 = 0 and beta2 = 1/(1 + C²): there "
            "rho_inf = 1 + 2/C² is below the threshold, and RAdam is projected SGD for ever. After "
            f"{steps['online']} steps {end('online', 'Adam')} (theory: +1 and "
            f"{regret_at('online', 1.0):.3f}), {end('online', 'RAdam')} (theory: -1 and 0).",
        ),
        Verdict(
            abs(rate.slope + 0.5) < 0.1,
            "Its average regret falls as t^-0.5, which projected SGD guarantees: the power is "
            f"{rate.slope:.3f} ± {1.96 * rate.stderr:.3f} (least squares).",
        ),
        Verdict(
            None if quick else stuck,
            "RAdam fails as Adam does on the stochastic problem with beta2 = 0.99, where it does "
            f"rectify: after {steps['stochastic']} steps {end('stochastic', 'RAdam')}, "
            f"{end('stochastic', 'Adam')} (theory: +1 and {regret_at('stochastic', 1.0):.2f}); "
            f"{end('stochastic', 'AMSGrad')}. r_t goes to 1, and RAdam becomes Adam.",
        ),
    ]


def draw(rows: pd.DataFrame) -> Figure:
    figure, axes = plots.panels(2)
    colors = plots.COLORS | {"AMSGrad": plots.GREEN}
    titles = {
        "online": f"online, C = {C:g}, beta2 = {ONLINE_BETAS[1]:g}",
        "stochastic": f"stochastic, beta2 = {STOCHASTIC_BETAS[1]}",
    }
    for ax, (problem, title) in zip(axes, titles.items(), strict=True):
        for optimizer in OPTIMIZERS:
            at = rows[(rows["problem"] == problem) & (rows["optimizer"] == optimizer)]
            regret = at["regret"], at["half"]
            plots.band(ax, at["step"], regret, color=colors[optimizer], label=optimizer)
        ax.axhline(regret_at(problem, 1.0), color=plots.GREY, ls=":", label="theory, at x = +1")
        ax.set(xscale="log", xlabel="step t", title=title, ylim=(0, None))
    axes[0].set_ylabel("average regret")
    axes[0].legend()
    return figure
