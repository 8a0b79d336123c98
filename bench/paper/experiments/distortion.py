"""Distributions of gradients and adaptive rates in the first updates of a training."""

from itertools import islice, product

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from ..harness import optimizers, plots
from ..harness.experiment import Row, Run, Verdict
from ..harness.language import TrainingStep, training
from ..harness.statistics import Mean, mean_interval
from .controls import LAYERS, LR, STEPS

TITLE = "Gradients and adaptive rates in the first updates"
CLAIM = (
    "Without warmup, Adam's first ten updates distort the distribution of the gradients toward "
    "small values; warmup, Adam-2k and Adam-eps avoid it (sections 2 and 3.1, Fig. 2 and 3)."
)
NAMES = ("Adam", "Adam with warmup", "Adam-2k", "Adam-eps", "RAdam")
UPDATES = (1, 2, 5, 10, 20, 50, 100)
SEEDS = 5
WIDTH = 0.25  # of a bin, in decades
EDGES = {
    "gradient": np.arange(-10, 1 + WIDTH, WIDTH),
    "adaptive rate": np.arange(-1, 10 + WIDTH, WIDTH),
}


def histograms(optimizer: str, seed: int, layers: int, updates: int) -> list[Row]:
    """Counts of log10 |g| and log10 psi over all parameters, after some of the updates.

    Parameters that have had no gradient (bytes not seen) are left out: eps alone determines their
    rate. Updates of Adam-2k are counted from the first that changes parameters.
    """
    before = optimizers.hold_steps(STEPS) if optimizer == "Adam-2k" else 0
    rows: list[Row] = []
    steps = training(optimizer, LR, STEPS, seed=seed, layers=layers)
    for at in islice(steps, before + updates):
        if (update := at.step - before) not in UPDATES:
            continue
        for (quantity, edges), values in zip(EDGES.items(), logarithms(at), strict=True):
            counts, _ = np.histogram(values.clip(edges[0], edges[-1]), edges)
            of = {"optimizer": optimizer, "seed": seed, "update": update, "quantity": quantity}
            summary = {"median": float(np.median(values)), "spread": float(np.std(values))}
            bins = {f"bin {bin}": int(count) for bin, count in enumerate(counts)}
            rows.append({**of, **summary, **bins})
    return rows


def logarithms(at: TrainingStep) -> tuple[np.ndarray, np.ndarray]:
    """log10 |g| and log10 psi of all parameters for which they are defined."""
    optimizer = at.optimizer
    (group,) = optimizer.param_groups
    g = torch.cat([p.grad.flatten() for p in group["params"]]).abs()
    if isinstance(optimizer, optimizers.Momentum):
        rate, squares, t = optimizer.psi, optimizer.exp_avg_sq, optimizer.t
    else:
        states = [optimizer.state[p] for p in group["params"]]
        squares, t = torch.cat([s["exp_avg_sq"].flatten() for s in states]), int(states[0]["step"])
        rate = optimizers.RAdam.psi
    psi = rate(group, squares, t) * torch.ones_like(squares)
    return g[g > 0].log10().numpy(), psi[squares > 0].log10().numpy()


def runs(quick: bool) -> list[Run]:
    size = {"layers": 1, "updates": 5} if quick else {"layers": LAYERS, "updates": max(UPDATES)}
    return [
        Run(histograms, {"optimizer": name, "seed": seed, **size})
        for name in NAMES
        for seed in range(2 if quick else SEEDS)
    ]


def changes(rows: pd.DataFrame, update: int, quantity: str = "median") -> pd.DataFrame:
    """Change of the median (or spread) of log10 |g| since the first update: seeds by optimizers."""
    gradients = rows[rows["quantity"] == "gradient"]
    values = gradients.pivot(index=["seed", "optimizer"], columns="update", values=quantity)
    return (values[update] - values[1]).unstack()[list(NAMES)]


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Changes of the gradients' median and spread since the first update, in decades."""
    columns = {"optimizer": NAMES}
    for update in sorted({10, 100} & set(rows["update"])):
        for quantity in ("median", "spread"):
            intervals = zip(*mean_interval(changes(rows, update, quantity)), strict=True)
            columns[f"{quantity} by update {update}"] = [f"{Mean(*i):+.2f}" for i in intervals]
    return pd.DataFrame(columns)


def judge(rows: pd.DataFrame, quick: bool) -> list[Verdict]:
    update = 5 if quick else 10
    moved = changes(rows, update)
    adam = mean_interval(moved["Adam"])
    verdicts = [
        Verdict(
            adam.is_negative(),
            f"Adam's first {update} updates distort the gradients towards small values: their "
            f"median moves by {adam:+.2f} decades (95%, {len(moved)} seeds)",
        )
    ]
    for name in NAMES[1:]:
        above_half = mean_interval(moved[name] - moved["Adam"] / 2)
        text = f"{name} avoids more than half of that: {mean_interval(moved[name]):+.2f}"
        verdicts.append(Verdict(above_half.is_positive(), text))
    return verdicts


def draw(rows: pd.DataFrame) -> Figure:
    figure, axes = plots.panels(len(NAMES), 2, height=2.6, sharey=True)
    for ax, (quantity, name) in zip(axes, product(EDGES, NAMES), strict=True):
        at = rows[(rows["quantity"] == quantity) & (rows["optimizer"] == name)]
        centers = EDGES[quantity][:-1] + WIDTH / 2
        counts = at.groupby("update")[[f"bin {bin}" for bin in range(len(centers))]].sum()
        shares = counts.div(counts.sum(axis=1), axis=0)
        # As in the paper: one histogram above the other, the first update at the bottom.
        for place, share in enumerate(shares.to_numpy()):
            top = place + 0.9 * share / share.max()
            ax.fill_between(centers, place, top, color=plots.COLORS[name], alpha=0.7, lw=0)
        ax.set_yticks(range(len(shares)), shares.index)
        ax.grid(visible=False, axis="y")
        if quantity == "gradient":
            ax.set_title(name, fontsize=10)
        ax.set_xlabel("log10 |g|" if quantity == "gradient" else "log10 psi")
    axes[0].set_ylabel("update")
    axes[len(NAMES)].set_ylabel("update")
    return figure
