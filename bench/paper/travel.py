"""A long way down a gentle slope: RAdam loses, by a factor that is known in advance."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from radam_kernels.schedule import rectification

from . import style
from .chains import walk
from .experiment import Experiment, Row, Run, Verdict
from .intervals import mean_interval

LR, BETAS = 0.01, (0.9, 0.999)
SLOPE, NOISE = 0.01, 0.1  # of the loss; and the noise of its gradient, as a part of it
OPTIMIZERS = ("Adam", "RAdam")
NEAR = 0.02  # how far theory may be off, which leaves the noise out: psi is 0.5% smaller for it
FULL = {"chains": 10_000, "steps": 2_600, "points": 40, "goals": [10, 30, 100, 300, 1000]}


def distances(optimizer: str, steps: int) -> np.ndarray:
    """How far the optimizer has come after each step, in units of lr, for gradients without noise.

    Then m_hat and sqrt(v_hat) are the slope itself. Adam moves by lr a step; RAdam by lr r_t once
    it is rectified, and by lr times the slope before.
    """
    if optimizer == "Adam":
        return np.arange(1.0, steps + 1)
    factors = (rectification(t, BETAS[1]) for t in range(1, steps + 1))
    return np.cumsum([SLOPE if r_t is None else r_t for r_t in factors])


def steps_to(optimizer: str, goal: float, steps: int) -> int:
    """The step at which `distances` first reaches `goal`, among so many."""
    return 1 + int(np.searchsorted(distances(optimizer, steps), goal))


def travel(
    optimizer: str, chains: int, steps: int, points: int, goals: list[int], seed: int
) -> list[Row]:
    """Means over chains with 95% intervals, and the theory's value beside each.

    They are of two kinds: `distance` at a step, and `steps` to each of the `goals`.
    """
    generator = np.random.default_rng(seed)
    wanted = {round(step) for step in np.geomspace(1, steps, points)}
    theory = distances(optimizer, steps)
    needed = {float(goal): torch.ones(chains, dtype=torch.float64) for goal in goals}

    def gradient(t: int, x: torch.Tensor) -> torch.Tensor:
        return SLOPE * (1 + NOISE * torch.from_numpy(generator.standard_normal(chains)))

    def row(of: str, x: float, values: torch.Tensor, truth: float) -> Row:
        mean, half = mean_interval(values.numpy())
        return {
            "optimizer": optimizer, "chains": chains, "of": of, "x": x,
            "mean": mean, "half": half, "theory": truth,
        }  # fmt: skip

    start = torch.zeros(chains, dtype=torch.float64)
    path = walk(optimizer, start, gradient, steps, lr=lambda t: LR, betas=BETAS)
    rows: list[Row] = []
    for t, x in enumerate(path, start=1):
        come = -x / LR
        for goal, count in needed.items():
            count += come < goal
        if t in wanted:
            rows.append(row("distance", t, come, theory[t - 1]))
    for goal, count in needed.items():
        if count.max() > steps:
            raise ValueError(f"steps: {steps} are too few to come as far as {goal}")
        rows.append(row("steps", goal, count, steps_to(optimizer, goal, steps)))
    return rows


def runs(quick: bool) -> list[Run]:
    size = {"chains": 500, "steps": 400, "points": 12, "goals": [10, 100]} if quick else FULL
    return [
        Run(optimizer, travel, {"optimizer": optimizer, "seed": seed, **size})
        for seed, optimizer in enumerate(OPTIMIZERS)
    ]


def judge(rows: pd.DataFrame, quick: bool) -> list[Verdict]:
    needed = rows[rows["of"] == "steps"].pivot(
        index="x", columns="optimizer", values=["mean", "half", "theory"]
    )
    travelled = rows[rows["of"] == "distance"]
    off = (travelled["mean"] / travelled["theory"] - 1).abs().max()
    told = ", ".join(
        f"{goal:.0f} lr away {of['mean', 'RAdam']:.0f} ± {of['half', 'RAdam']:.1g} steps (theory "
        f"{of['theory', 'RAdam']:.0f}) to Adam's {of['mean', 'Adam']:.0f} ± "
        f"{of['half', 'Adam']:.1g} ({of['theory', 'Adam']:.0f})"
        for goal, of in needed.iterrows()
    )
    later = needed["mean", "RAdam"] - needed["half", "RAdam"] > needed["mean", "Adam"]
    return [
        Verdict(later.all(), f"RAdam arrives later than Adam. It needs, to a goal {told}."),
        Verdict(
            off < NEAR,
            "The sum of r_t foretells it: the distances are within "
            f"{off:.1%} of theory, which leaves the noise out, at every step.",
        ),
    ]


def draw(rows: pd.DataFrame) -> Figure:
    figure, (left, right) = style.panels(2)
    for ax, of in ((left, "distance"), (right, "steps")):
        for optimizer in OPTIMIZERS:
            r = rows[(rows["of"] == of) & (rows["optimizer"] == optimizer)]
            color = style.OPTIMIZERS[optimizer]
            style.band(ax, r["x"], r["mean"], r["half"], color=color, label=optimizer)
            ax.plot(r["x"], r["theory"], "x", color=style.BLACK, ms=4)
        ax.set(xscale="log", yscale="log")
    left.plot([], [], "x", color=style.BLACK, ms=4, label="theory")
    left.set(xlabel="step t", ylabel="distance travelled, in lr", title="How far after t steps")
    right.set(xlabel="distance to go, in lr", ylabel="steps needed", title="How long to a goal")
    style.legend(left)
    return figure


EXPERIMENT = Experiment(
    name="travel",
    title="Toy 2: a long way down a gentle slope",
    claim=(
        f"Caution costs: down a slope of {SLOPE} with little noise, where Adam's first steps are "
        "already good, RAdam loses, and the sum of r_t says by how much (ours)."
    ),
    runs=runs,
    judge=judge,
    draw=draw,
)
