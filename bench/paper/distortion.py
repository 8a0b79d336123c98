"""Gradients and adaptive rates in the first updates (the paper's Fig. 2 and 3)."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from . import frame, style
from .controls import LAYERS, LR, STEPS
from .experiment import Experiment, Row, Run, Verdict
from .intervals import mean_interval
from .language import Moment, training
from .optimizers import MAKE, hold, slug
from .search import SIZE

NAMES = ("Adam", "Adam with warmup", "Adam-2k", "Adam-eps", "RAdam")
UPDATES = (1, 2, 5, 10, 20, 50, 100)
SEEDS = 5
WIDTH = 0.25  # decades in a bin
EDGES = {
    "gradient": np.arange(-10, 1 + WIDTH, WIDTH),
    "adaptive rate": np.arange(-1, 10 + WIDTH, WIDTH),
}


def histograms(optimizer: str, seed: int, layers: int, updates: int) -> list[Row]:
    """Counts of log10 |g| and log10 psi over all parameters, after some of the updates.

    Parameters that have not had a gradient (bytes not seen) are left out: eps alone is their rate.
    Adam-2k's updates count from its first that moves a parameter.
    """
    before = hold(STEPS) if optimizer == "Adam-2k" else 0
    rows: list[Row] = []
    for moment in training(
        lambda params: MAKE[optimizer](params, LR, STEPS),
        seed=seed,
        layers=layers,
        steps=before + updates,
        **SIZE,
    ):
        if (update := moment.step - before) not in UPDATES:
            continue
        for quantity, values in zip(EDGES, logarithms(moment), strict=True):
            edges = EDGES[quantity]
            counts, _ = np.histogram(values.clip(edges[0], edges[-1]), edges)
            rows.append(
                {
                    "optimizer": optimizer,
                    "seed": seed,
                    "update": update,
                    "quantity": quantity,
                    "median": float(np.median(values)),
                    "spread": float(np.std(values)),
                }
                | {f"bin {bin}": int(count) for bin, count in enumerate(counts)}
            )
    return rows


def logarithms(moment: Moment) -> tuple[np.ndarray, np.ndarray]:
    """log10 |g| and log10 psi of every parameter where they are defined, in decades."""
    optimizer = moment.optimizer
    (group,) = optimizer.param_groups
    g = torch.cat([p.grad.flatten() for p in group["params"]]).abs()
    if isinstance(optimizer, frame.Momentum):
        rate, squares, t = optimizer.psi, optimizer.exp_avg_sq, optimizer.t
    else:
        states = [optimizer.state[p] for p in group["params"]]
        squares, t = torch.cat([s["exp_avg_sq"].flatten() for s in states]), int(states[0]["step"])
        rate = frame.RAdam.psi
    psi = rate(group, squares, t) * torch.ones_like(squares)
    return g[g > 0].log10().numpy(), psi[squares > 0].log10().numpy()


def runs(quick: bool) -> list[Run]:
    size = {"layers": 1, "updates": 5} if quick else {"layers": LAYERS, "updates": max(UPDATES)}
    return [
        Run(f"{slug(name)}-seed{seed}", histograms, {"optimizer": name, "seed": seed, **size})
        for name in NAMES
        for seed in range(2 if quick else SEEDS)
    ]


def changes(rows: pd.DataFrame, update: int, of: str = "median") -> pd.DataFrame:
    """Decades by which the median of |g| has moved since the first update, or its spread grown."""
    gradients = rows[rows["quantity"] == "gradient"]
    found = gradients.pivot(index=["seed", "optimizer"], columns="update", values=of)
    return (found[update] - found[1]).unstack()[list(NAMES)]


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """By how many decades the gradients have moved, and spread, since the first update."""
    updates = [update for update in (10, 100) if update in set(rows["update"])]
    told = {"optimizer": NAMES}
    for update in updates:
        for of, heading in (("median", "median by"), ("spread", "spread by")):
            mean, half = mean_interval(changes(rows, update, of))
            told[f"{heading} update {update}"] = [
                f"{m:+.2f} ± {h:.2f}" for m, h in zip(mean, half, strict=True)
            ]
    return pd.DataFrame(told)


def judge(rows: pd.DataFrame, quick: bool) -> list[Verdict]:
    update = 5 if quick else 10
    moved = changes(rows, update)
    fall, half = mean_interval(moved["Adam"])
    verdicts = [
        Verdict(
            bool(fall < 0) if abs(fall) > half else None,
            f"Adam's first {update} updates distort the gradients towards small values: their "
            f"median moves by {fall:+.2f} ± {half:.2f} decades (95%, {len(moved)} seeds)",
        )
    ]
    for name in NAMES[1:]:
        mean, half = mean_interval(moved[name])
        left, left_half = mean_interval(moved[name] - moved["Adam"] / 2)
        verdicts.append(
            Verdict(
                bool(left > 0) if abs(left) > left_half else None,
                f"{name} avoids more than half of that: {mean:+.2f} ± {half:.2f}",
            )
        )
    return verdicts


def draw(rows: pd.DataFrame) -> Figure:
    figure, axes = style.panels(len(NAMES), 2, height=2.6, sharey=True)
    for ax, (quantity, name) in zip(
        axes, [(quantity, name) for quantity in EDGES for name in NAMES], strict=True
    ):
        of = rows[(rows["quantity"] == quantity) & (rows["optimizer"] == name)]
        edges = EDGES[quantity]
        counts = of.groupby("update")[[f"bin {bin}" for bin in range(len(edges) - 1)]].sum()
        shares = counts.div(counts.sum(axis=1), axis=0)
        places = range(len(shares))
        # As in the paper: one histogram above the other, the first update at the bottom.
        for place, share in zip(places, shares.to_numpy(), strict=True):
            top = place + 0.9 * share / share.max()
            ax.fill_between(
                edges[:-1] + WIDTH / 2, place, top, color=style.OPTIMIZERS[name], alpha=0.7, lw=0
            )
        ax.set_yticks(places, shares.index)
        ax.grid(visible=False, axis="y")
        if quantity == "gradient":
            ax.set_title(name, fontsize=10)
        ax.set_xlabel("log10 |g|" if quantity == "gradient" else "log10 psi")
    axes[0].set_ylabel("update")
    axes[len(NAMES)].set_ylabel("update")
    return figure


EXPERIMENT = Experiment(
    name="distortion",
    title="Gradients and adaptive rates in the first updates",
    claim=(
        "Without warmup, Adam's first ten updates distort the distribution of the gradients toward "
        "small values; warmup, Adam-2k and Adam-eps avoid it (sections 2 and 3.1, Fig. 2 and 3)."
    ),
    runs=runs,
    judge=judge,
    draw=draw,
    table=table,
)
