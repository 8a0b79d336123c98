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
STALLED = 3.0  # nats per byte: who knows the frequencies of single bytes has 3.25


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


def losses(rows: pd.DataFrame, over_seeds: str) -> pd.DataFrame:
    """Depth and learning rate by optimizer."""
    index = ["layers", "lr"]
    return rows.pivot_table("held_out", index, "optimizer", aggfunc=over_seeds)


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """What each optimizer reaches at its best learning rate, and the largest that it bears."""
    mean, worst = losses(rows, "mean"), losses(rows, "max")
    told = []
    for depth, name in product(sorted(rows["layers"].unique()), rows["optimizer"].unique()):
        best, most = mean.loc[depth, name].dropna(), worst.loc[depth, name].dropna()
        rates = most[most < STALLED].index
        told.append(
            {
                "layers": depth,
                "optimizer": name,
                "best held-out loss": f"{best.min():.2f} at {best.idxmin():g}",
                "largest rate at which no seed stalls": f"{rates.max():g}"
                if len(rates)
                else "none",
                "of rates up to": f"{best.index.max():g}",
            }
        )
    return pd.DataFrame(told)


def judge(rows: pd.DataFrame, quick: bool) -> list[Verdict]:
    mean = losses(rows, "mean")[["Adam", "Adam with warmup"]].dropna()
    # Of all seeds: the best without warmup against the worst with it.
    gap = (losses(rows, "min")["Adam"] - losses(rows, "max")["Adam with warmup"]).dropna()
    best = mean.groupby("layers").min()
    useful = mean["Adam with warmup"] < best.min(axis=1).reindex(mean.index, level="layers") + NEAR
    found = mean[(gap > SUFFERS) & useful]
    told = "; ".join(
        f"{layers} layers at {lr:g}: {adam:.2f} without and {warm:.2f} with"
        for (layers, lr), adam, warm in found.itertuples()
    )
    at_best = "; ".join(
        f"{layers} layers: {adam:.2f} without and {warm:.2f} with"
        for layers, adam, warm in best.itertuples()
    )
    return [
        Verdict(
            len(found) > 0,
            f"in {len(found)} of {len(gap)} settings Adam loses more than {SUFFERS} nats per byte "
            f"without warmup, in every seed, where with warmup it is within {NEAR} of the depth's "
            f"best{f' ({told})' if told else ''}",
        ),
        Verdict(
            bool((best["Adam"] - best["Adam with warmup"] > SUFFERS).any()),
            f"it loses as much with the learning rate that suits it ({at_best})",
        ),
    ]


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
        rates = [lr for lr in RATES["Adam"] if lr in set(rows["lr"])]
        ax.set_xticks(rates, [f"{1e3 * lr:g}" for lr in rates])
        ax.set_xticks([], minor=True)
        ax.set(xlabel="learning rate / 0.001", title=f"{depth} layers, {SEEDS} seeds")
    axes[0].set_ylabel("held-out loss (nats/byte)")
    style.legend(axes[0])
    return figure


EXPERIMENT = Experiment(
    name="search",
    title="Where Adam needs warmup",
    claim=(
        "There are transformers that Adam fails to train at a useful learning rate unless the rate "
        "is warmed up (sections 1 and 2, Fig. 1)."
    ),
    runs=runs,
    judge=judge,
    draw=draw,
    table=table,
)
