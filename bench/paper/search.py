"""Where does Adam need warmup? Depth by learning rate, and the held-out loss of each optimizer."""

from __future__ import annotations

from itertools import product

import pandas as pd
from matplotlib.figure import Figure

from . import style
from .experiment import Experiment, Row, Run, Verdict
from .language import training
from .optimizers import MAKE, slug

SIZE = {"width": 64, "context": 32, "batch": 8}
LAYERS = (4, 8)
RATES = {
    **dict.fromkeys(
        ("Adam", "Adam with warmup", "RAdam", "Adam-2k", "Adam-eps"),
        (1e-3, 1.5e-3, 2e-3, 3e-3, 4e-3),
    ),
    "SGD with momentum": (0.025, 0.05, 0.1, 0.2),
}
STEPS, SEEDS = 300, 2
SUFFERS, NEAR = 0.3, 0.1  # nats per byte: lost without warmup, and from the best learning rate


def final_loss(optimizer: str, lr: float, seed: int, layers: int, steps: int) -> list[Row]:
    """The held-out loss after the last step."""
    for moment in training(
        lambda params: MAKE[optimizer](params, lr, steps),
        seed=seed,
        layers=layers,
        steps=steps,
        **SIZE,
    ):
        last = moment
    loss = last.held_out_loss()
    return [{"layers": layers, "optimizer": optimizer, "lr": lr, "seed": seed, "held_out": loss}]


def runs(quick: bool) -> list[Run]:
    """The whole grid, or a corner of it."""
    layers, names, steps = ((1,), list(RATES)[:2], 10) if quick else (LAYERS, RATES, STEPS)
    return [
        Run(
            f"layers{depth}-{slug(name)}-lr{lr:g}-seed{seed}",
            final_loss,
            {"optimizer": name, "lr": lr, "seed": seed, "layers": depth, "steps": steps},
        )
        for depth, name in product(layers, names)
        for lr, seed in product(RATES[name][: 2 if quick else None], range(SEEDS))
    ]


def means(rows: pd.DataFrame) -> pd.DataFrame:
    """Over the seeds: depth and learning rate by optimizer."""
    return rows.pivot_table(index=["layers", "lr"], columns="optimizer", values="held_out")


def judge(rows: pd.DataFrame, quick: bool) -> list[Verdict]:
    loss = means(rows)[["Adam", "Adam with warmup"]].dropna()
    worst = rows.pivot_table(
        index=["layers", "lr"], columns="optimizer", values="held_out", aggfunc=("min", "max")
    )
    # Of all seeds: the best without warmup against the worst with it.
    gap = (worst["min"]["Adam"] - worst["max"]["Adam with warmup"]).dropna()
    best = loss.min(axis=1).groupby("layers").transform("min")
    useful = loss["Adam with warmup"] < best + NEAR
    found = gap[(gap > SUFFERS) & useful]
    told = "; ".join(
        f"{layers} layers at {lr:g}: {loss['Adam'][layers, lr]:.2f} without and "
        f"{loss['Adam with warmup'][layers, lr]:.2f} nats per byte with warmup"
        for layers, lr in found.index
    )
    fine = sorted(set(loss.index.get_level_values("layers")) - set(found.index.droplevel("lr")))
    verdicts = [
        Verdict(
            len(found) > 0,
            f"{len(found)} of {len(gap)} settings have Adam lose more than {SUFFERS} nats per byte "
            f"without warmup, in every seed, where warmup is within {NEAR} of the depth's best"
            + (f" ({told})" if told else ""),
        )
    ]
    if fine:
        best = loss.groupby("layers").min().loc[fine]
        told = "; ".join(
            f"{layers} layers: {adam:.2f} without and {warm:.2f} with"
            for layers, adam, warm in best.itertuples()
        )
        verdicts.append(
            Verdict(None, f"elsewhere a good learning rate makes up for warmup, at best {told}")
        )
    return verdicts


def draw(rows: pd.DataFrame) -> Figure:
    depths = sorted(rows["layers"].unique())
    figure, axes = style.panels(len(depths), sharey=True)
    for ax, depth in zip(axes, depths, strict=True):
        for name, color in style.OPTIMIZERS.items():
            of = rows[(rows["layers"] == depth) & (rows["optimizer"] == name)]
            # SGD's learning rates are another scale: what it reaches at best is a line.
            best = of.groupby("lr")["held_out"].mean()
            if name == "SGD with momentum":
                ax.axhline(best.min(), color=color, ls=":", label=f"{name}, at best")
            elif len(of):
                ax.semilogx(of["lr"], of["held_out"], ".", color=color)
                ax.semilogx(best.index, best, color=color, label=name)
        ax.set(xlabel="learning rate", title=f"{depth} layers")
    axes[0].set_ylabel("held-out loss (nats/byte)")
    style.legend(axes[0])
    return figure


EXPERIMENT = Experiment(
    name="search",
    title="Where Adam needs warmup",
    claim=(
        "There are transformers that Adam fails to train at a useful learning rate unless the rate "
        "is warmed up (sections 1 and 3.1, Fig. 1)."
    ),
    runs=runs,
    judge=judge,
    draw=draw,
)
