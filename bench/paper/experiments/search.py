"""Searches depth by learning rate for settings in which Adam needs warmup."""

from itertools import product

import pandas as pd
from matplotlib.figure import Figure

from ..harness import plots
from ..harness.experiment import Row, Run, Verdict
from ..harness.language import training

TITLE = "Where Adam needs warmup"
CLAIM = (
    "There are transformers that Adam fails to train at a useful learning rate unless the rate "
    "is warmed up (sections 1 and 2, Fig. 1)."
)
LAYERS = (4, 8)
ADAPTIVE = ("Adam", "Adam with warmup", "RAdam", "Adam-2k", "Adam-eps")
RATES = {
    **dict.fromkeys(ADAPTIVE, (1e-3, 1.5e-3, 2e-3, 3e-3, 4e-3)),
    "SGD with momentum": (0.025, 0.05, 0.1, 0.2),
}
STEPS, SEEDS = 300, 2
SUFFERS = 0.3  # nats per byte lost without warmup that we call trouble
NEAR = 0.1  # nats per byte from the best learning rate's loss that we call useful
STALLED = 3.0  # nats per byte; a model of single-byte frequencies has 3.25


def final_loss(optimizer: str, lr: float, seed: int, layers: int, steps: int) -> list[Row]:
    """The held-out loss after the last step."""
    *_, last = training(optimizer, lr, steps, seed=seed, layers=layers)
    loss = last.held_out_loss()
    return [{"layers": layers, "optimizer": optimizer, "lr": lr, "seed": seed, "held_out": loss}]


def runs(quick: bool) -> list[Run]:
    layers, names = ((1,), ADAPTIVE[:2]) if quick else (LAYERS, RATES)
    size = {"steps": 10 if quick else STEPS}
    return [
        Run(final_loss, {"optimizer": name, "lr": lr, "seed": seed, "layers": depth, **size})
        for depth, name in product(layers, names)
        for lr, seed in product(RATES[name][: 2 if quick else None], range(SEEDS))
    ]


def losses(rows: pd.DataFrame, over_seeds: str) -> pd.DataFrame:
    """Depth and learning rate by optimizer."""
    return rows.pivot_table("held_out", ["layers", "lr"], "optimizer", aggfunc=over_seeds)


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Each optimizer's best loss, and the largest learning rate at which no seed stalls."""
    mean, worst = losses(rows, "mean"), losses(rows, "max")
    lines = []
    for depth, name in product(sorted(rows["layers"].unique()), rows["optimizer"].unique()):
        best, most = mean.loc[depth, name].dropna(), worst.loc[depth, name].dropna()
        rates = most[most < STALLED].index
        largest = f"{rates.max():g}" if len(rates) else "none"
        lines.append(
            {
                "layers": depth,
                "optimizer": name,
                "best held-out loss": f"{best.min():.2f} at {best.idxmin():g}",
                "largest rate at which no seed stalls": largest,
                "of rates up to": f"{best.index.max():g}",
            }
        )
    return pd.DataFrame(lines)


def judge(rows: pd.DataFrame, quick: bool) -> list[Verdict]:
    mean = losses(rows, "mean")[["Adam", "Adam with warmup"]].dropna()
    # The best seed without warmup against the worst seed with it.
    gap = (losses(rows, "min")["Adam"] - losses(rows, "max")["Adam with warmup"]).dropna()
    best = mean.groupby("layers").min()
    useful = mean["Adam with warmup"] < best.min(axis=1).reindex(mean.index, level="layers") + NEAR
    found = mean[(gap > SUFFERS) & useful]
    found_text = "; ".join(
        f"{layers} layers at {lr:g}: {adam:.2f} without and {warm:.2f} with"
        for (layers, lr), adam, warm in found.itertuples()
    )
    best_text = "; ".join(
        f"{layers} layers: {adam:.2f} without and {warm:.2f} with"
        for layers, adam, warm in best.itertuples()
    )
    return [
        Verdict(
            len(found) > 0,
            f"in {len(found)} of {len(gap)} settings Adam loses more than {SUFFERS} nats per byte "
            f"without warmup, in every seed, where with warmup it is within {NEAR} of the depth's "
            f"best{f' ({found_text})' if found_text else ''}",
        ),
        Verdict(
            bool((best["Adam"] - best["Adam with warmup"] > SUFFERS).any()),
            f"it loses as much with the learning rate that suits it ({best_text})",
        ),
    ]


def draw(rows: pd.DataFrame) -> Figure:
    depths = sorted(rows["layers"].unique())
    figure, axes = plots.panels(len(depths), sharey=True)
    for ax, depth in zip(axes, depths, strict=True):
        for name, color in plots.COLORS.items():
            at = rows[(rows["layers"] == depth) & (rows["optimizer"] == name)]
            mean = at.groupby("lr")["held_out"].mean()
            if name == "SGD with momentum":  # its learning rates are on another scale
                ax.axhline(mean.min(), color=color, ls=":", label=f"{name}, at best")
            elif len(at):
                ax.semilogx(at["lr"], at["held_out"], ".", color=color)
                ax.semilogx(mean.index, mean, color=color, label=name)
        rates = [lr for lr in RATES["Adam"] if lr in set(rows["lr"])]
        ax.set_xticks(rates, [f"{1e3 * lr:g}" for lr in rates])
        ax.set_xticks([], minor=True)
        ax.set(xlabel="learning rate / 0.001", title=f"{depth} layers, {SEEDS} seeds")
    axes[0].set_ylabel("held-out loss (nats/byte)")
    axes[0].legend()
    return figure
