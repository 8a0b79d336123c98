"""Distances travelled down a gentle slope, and the sum of r_t, which predicts RAdam's."""

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from radam_kernels.schedule import rectification

from ..harness import plots
from ..harness.experiment import Row, Run, Verdict
from ..harness.statistics import mean_interval
from .simulation import log_spaced_steps, trajectory

LR, BETAS = 0.01, (0.9, 0.999)
SLOPE, NOISE = 0.01, 0.1  # of the loss; and the noise of its gradient, relative to it
TITLE = "Toy 2: a long way down a gentle slope"
CLAIM = (
    f"On a slope of {SLOPE} with little noise, where Adam's first steps are already good, RAdam is "
    "slower, and the sum of r_t predicts by how much (ours)."
)
OPTIMIZERS = ("Adam", "RAdam")
NEAR = 0.02  # relative error allowed for the theory, which has no noise (0.5% in psi)
FULL = {"chains": 10_000, "steps": 2_600, "points": 40, "goals": [10, 30, 100, 300, 1000]}


def predicted_distances(optimizer: str, steps: int) -> np.ndarray:
    """The distance travelled after each step, in units of lr, for gradients without noise.

    m_hat and sqrt(v_hat) are then the slope itself. Adam moves by lr a step; RAdam by lr r_t where
    it rectifies, and by lr times the slope before.
    """
    if optimizer == "Adam":
        return np.arange(1.0, steps + 1)
    factors = (rectification(t, BETAS[1]) for t in range(1, steps + 1))
    return np.cumsum([SLOPE if r_t is None else r_t for r_t in factors])


def predicted_steps(optimizer: str, goal: float, steps: int) -> int:
    """The first of `steps` steps after which `predicted_distances` reaches `goal`."""
    return 1 + int(np.searchsorted(predicted_distances(optimizer, steps), goal))


def simulate(
    optimizer: str, chains: int, steps: int, points: int, goals: list[int], seed: int
) -> list[Row]:
    """Means over chains with 95% intervals, and the predicted value of each.

    Two kinds of rows: the `distance` at a step, and the `steps` to each of the `goals`.
    """
    generator = np.random.default_rng(seed)
    recorded = log_spaced_steps(1, steps, points)
    predicted = predicted_distances(optimizer, steps)
    needed = {float(goal): torch.ones(chains, dtype=torch.float64) for goal in goals}
    rows: list[Row] = []

    def gradient(t: int, x: torch.Tensor) -> torch.Tensor:
        return SLOPE * (1 + NOISE * torch.from_numpy(generator.standard_normal(chains)))

    def add_row(kind: str, x: float, values: torch.Tensor, theory: float) -> None:
        mean, half = mean_interval(values.numpy())
        of = {"optimizer": optimizer, "chains": chains, "of": kind, "x": x}
        rows.append({**of, "mean": mean, "half": half, "theory": theory})

    start = torch.zeros(chains, dtype=torch.float64)
    path = trajectory(optimizer, start, gradient, steps, lr=lambda t: LR, betas=BETAS)
    for t, x in enumerate(path, start=1):
        distance = -x / LR
        for goal, count in needed.items():
            count += distance < goal
        if t in recorded:
            add_row("distance", t, distance, predicted[t - 1])
    for goal, count in needed.items():
        if count.max() > steps:
            raise ValueError(f"steps: {steps} are too few for a distance of {goal}")
        add_row("steps", goal, count, predicted_steps(optimizer, goal, steps))
    return rows


def runs(quick: bool) -> list[Run]:
    size = {"chains": 500, "steps": 400, "points": 12, "goals": [10, 100]} if quick else FULL
    return [
        Run(simulate, {"optimizer": optimizer, "seed": seed, **size})
        for seed, optimizer in enumerate(OPTIMIZERS)
    ]


def judge(rows: pd.DataFrame, quick: bool) -> list[Verdict]:
    steps, distances = (rows[rows["of"] == kind] for kind in ("steps", "distance"))
    needed = steps.pivot(index="x", columns="optimizer", values=["mean", "half", "theory"])
    off = (distances["mean"] / distances["theory"] - 1).abs().max()
    needed_text = ", ".join(
        f"{goal:.0f} lr away {at['mean', 'RAdam']:.0f} ± {at['half', 'RAdam']:.1g} steps (theory "
        f"{at['theory', 'RAdam']:.0f}) to Adam's {at['mean', 'Adam']:.0f} ± "
        f"{at['half', 'Adam']:.1g} ({at['theory', 'Adam']:.0f})"
        for goal, at in needed.iterrows()
    )
    later = needed["mean", "RAdam"] - needed["half", "RAdam"] > needed["mean", "Adam"]
    return [
        Verdict(later.all(), f"RAdam arrives later than Adam. It needs, to a goal {needed_text}."),
        Verdict(
            off < NEAR,
            "The sum of r_t foretells it: the distances are within "
            f"{off:.1%} of theory, which leaves the noise out, at every step.",
        ),
    ]


def draw(rows: pd.DataFrame) -> Figure:
    figure, (left, right) = plots.panels(2)
    for ax, kind in ((left, "distance"), (right, "steps")):
        for optimizer in OPTIMIZERS:
            at = rows[(rows["of"] == kind) & (rows["optimizer"] == optimizer)]
            color = plots.COLORS[optimizer]
            plots.band(ax, at["x"], (at["mean"], at["half"]), color=color, label=optimizer)
            ax.plot(at["x"], at["theory"], "x", color=plots.BLACK, ms=4)
        ax.set(xscale="log", yscale="log")
    left.plot([], [], "x", color=plots.BLACK, ms=4, label="theory")
    left.set(xlabel="step t", ylabel="distance travelled, in lr", title="How far after t steps")
    right.set(xlabel="distance to go, in lr", ylabel="steps needed", title="How long to a goal")
    left.legend()
    return figure
