"""How wide is the range of learning rates that work? Digits, a small convolutional net."""

from __future__ import annotations

from itertools import product

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from scipy import stats
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional as F

from . import style
from .experiment import Experiment, Row, Run, Verdict
from .intervals import mean_interval
from .optimizers import MAKE, slug

ADAPTIVE = tuple(float(f"{lr:.3g}") for lr in np.geomspace(1e-4, 1e-1, 13))
# SGD's learning rates are another scale; as many of them, as far apart.
RATES = {
    **dict.fromkeys(("RAdam", "Adam", "Adam with warmup"), ADAPTIVE),
    "SGD with momentum": tuple(float(f"{100 * lr:.3g}") for lr in ADAPTIVE),
}
EPOCHS, BATCH, SEEDS = 20, 64, 6
NEAR = 0.01  # of accuracy: what counts as near the best


def accuracy(optimizer: str, lr: float, seed: int, epochs: int) -> list[Row]:
    """The share of a third of the digits, held out, that a net trained on the others knows."""
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=1 / 3, stratify=labels, random_state=seed
    )
    labels = torch.tensor(labels)
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 10),
    )
    draws = torch.Generator().manual_seed(seed)
    steps = epochs * -(-len(train) // BATCH)
    stepper = MAKE[optimizer](model.parameters(), lr, steps)
    for _ in range(epochs):
        order = torch.tensor(train)[torch.randperm(len(train), generator=draws)]
        for batch in order.split(BATCH):
            stepper.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            stepper.step()
    with torch.no_grad():
        right = model(images[test]).argmax(1) == labels[test]
    return [
        {"optimizer": optimizer, "lr": lr, "seed": seed, "accuracy": right.float().mean().item()}
    ]


def runs(quick: bool) -> list[Run]:
    every, epochs, seeds = (6, 1, 2) if quick else (1, EPOCHS, SEEDS)
    return [
        Run(
            f"{slug(name)}-lr{lr:g}-seed{seed}",
            accuracy,
            {"optimizer": name, "lr": lr, "seed": seed, "epochs": epochs},
        )
        for name, rates in RATES.items()
        for lr, seed in product(rates[::every], range(seeds))
    ]


def width(rates: np.ndarray, accuracies: np.ndarray) -> float:
    """Decades around the best rate in which accuracy is within NEAR of the best one's.

    Accuracy is taken as linear in the logarithm of the rate; the range ends where the grid does.
    """
    decades = np.log10(rates)
    best, floor = int(accuracies.argmax()), accuracies.max() - NEAR
    ends = []
    for way in (-1, 1):
        outward = slice(best, None, way)
        low = np.flatnonzero(accuracies[outward] < floor)
        if low.size:
            at = best + way * np.array([low[0], low[0] - 1])
            ends.append(np.interp(floor, accuracies[at], decades[at]))
        else:
            ends.append(decades[outward][-1])
    return float(ends[1] - ends[0])


def widths(rows: pd.DataFrame) -> pd.DataFrame:
    """`width` of each seed's accuracies: seeds by optimizers."""
    found = {
        name: {
            seed: width(one["lr"].to_numpy(), one["accuracy"].to_numpy())
            for seed, one in rows[rows["optimizer"] == name].sort_values("lr").groupby("seed")
        }
        for name in RATES
    }
    return pd.DataFrame(found)


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """The best rate by mean accuracy, that accuracy, and the range within NEAR of a seed's best."""
    told = []
    for name, width in widths(rows).items():
        of = rows[rows["optimizer"] == name].pivot(index="seed", columns="lr", values="accuracy")
        best = of.mean().idxmax()
        accuracy, range_ = mean_interval(of[best]), mean_interval(width)
        told.append(
            {
                "optimizer": name,
                "best learning rate": f"{best:g}",
                "accuracy there": f"{accuracy.mean:.2%} ± {accuracy.half:.2%}",
                "decades within 1%": f"{range_.mean:.2f} ± {range_.half:.2f}",
            }
        )
    return pd.DataFrame(told)


def judge(rows: pd.DataFrame, quick: bool) -> list[Verdict]:
    width = widths(rows)
    verdicts = []
    for other in ("Adam", "SGD with momentum", "Adam with warmup"):
        difference, half = mean_interval(width["RAdam"] - width[other])
        p = stats.wilcoxon(width["RAdam"], width[other]).pvalue
        sure = abs(difference) > half
        verdicts.append(
            Verdict(
                bool(difference > 0) if sure else None,
                f"RAdam is within {NEAR:.0%} of its best accuracy over {width['RAdam'].mean():.2f} "
                f"decades of learning rates, {other} over {width[other].mean():.2f}: "
                f"{difference:+.2f} ± {half:.2f} (95%, {len(width)} seeds; Wilcoxon p = {p:.2g})",
            )
        )
    return verdicts


def draw(rows: pd.DataFrame) -> Figure:
    figure, (left, right) = style.panels(2, width_ratios=(1.8, 1))
    for name in RATES:
        color = style.OPTIMIZERS[name]
        of = rows[rows["optimizer"] == name].pivot(index="seed", columns="lr", values="accuracy")
        mean, half = mean_interval(of)
        scale = 100 if name == "SGD with momentum" else 1
        style.band(left, of.columns / scale, mean, half, color=color, label=name, marker=".")
    best = rows.groupby(["optimizer", "lr"])["accuracy"].mean().max()
    left.set(
        xscale="log", xlabel="learning rate (SGD with momentum: 100 times that)",
        ylabel="accuracy on held-out digits",
        title=f"Mean and 95% band of {rows['seed'].nunique()} seeds",
        ylim=(best - 0.15, 1),
    )  # fmt: skip
    style.legend(left, loc="lower center")
    width = widths(rows)
    mean, half = mean_interval(width)
    for place, name in enumerate(width):
        color = style.OPTIMIZERS[name]
        right.plot(width[name], [place + 0.25] * len(width), ".", color=color, alpha=0.4)
        right.errorbar(mean[place], place, xerr=half[place], fmt="o", color=color, capsize=4)
    right.set_yticks(range(len(RATES)), [name.replace(" with ", "\nwith ") for name in RATES])
    right.invert_yaxis()
    right.set(xlabel="decades of learning rates", title="Within 1% of the best")
    return figure


EXPERIMENT = Experiment(
    name="robustness",
    title="Robustness to the learning rate",
    claim=(
        "RAdam reaches about the same accuracy over a wider range of learning rates than Adam and "
        "SGD with momentum (section 5.1, Fig. 6)."
    ),
    runs=runs,
    judge=judge,
    draw=draw,
    table=table,
)
