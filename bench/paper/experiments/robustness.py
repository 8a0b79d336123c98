"""The range of learning rates that work, for a small convolutional network on digits."""

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

from ..harness import plots
from ..harness.experiment import Row, Run, Verdict
from ..harness.optimizers import MAKE
from ..harness.statistics import mean_interval

TITLE = "Robustness to the learning rate"
CLAIM = (
    "RAdam reaches about the same accuracy over a wider range of learning rates than Adam and "
    "SGD with momentum (section 5.1, Fig. 6)."
)
ADAPTIVE = tuple(float(f"{lr:.3g}") for lr in np.geomspace(1e-4, 1e-1, 13))
# SGD's learning rates are on another scale; same number and spacing.
RATES = {
    **dict.fromkeys(("RAdam", "Adam", "Adam with warmup"), ADAPTIVE),
    "SGD with momentum": tuple(float(f"{100 * lr:.3g}") for lr in ADAPTIVE),
}
EPOCHS, BATCH, SEEDS = 20, 64, 6
NEAR = 0.01  # distance from the best accuracy that we call near


def accuracy(optimizer: str, lr: float, seed: int, epochs: int) -> list[Row]:
    """Accuracy on a held-out third of the digits after training on the others."""
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
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * -(-len(train) // BATCH)
    stepper = MAKE[optimizer](model.parameters(), lr, steps)
    for _ in range(epochs):
        order = torch.tensor(train)[torch.randperm(len(train), generator=generator)]
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
        Run(accuracy, {"optimizer": name, "lr": lr, "seed": seed, "epochs": epochs})
        for name, rates in RATES.items()
        for lr, seed in product(rates[::every], range(seeds))
    ]


def width(rates: np.ndarray, accuracies: np.ndarray) -> float:
    """Decades around the best rate in which accuracy is within NEAR of the best one's.

    Accuracy is interpolated linearly in the logarithm of the rate; the range ends with the grid.
    """
    decades = np.log10(rates)
    best, floor = int(accuracies.argmax()), accuracies.max() - NEAR
    ends = []
    for direction in (-1, 1):
        outward = slice(best, None, direction)
        low = np.flatnonzero(accuracies[outward] < floor)
        if low.size:
            at = best + direction * np.array([low[0], low[0] - 1])
            ends.append(np.interp(floor, accuracies[at], decades[at]))
        else:
            ends.append(decades[outward][-1])
    return float(ends[1] - ends[0])


def widths(rows: pd.DataFrame) -> pd.DataFrame:
    """`width` of each seed's accuracies: seeds by optimizers."""
    trainings = rows.sort_values("lr").groupby(["seed", "optimizer"])[["lr", "accuracy"]]
    return trainings.apply(lambda one: width(*one.to_numpy().T)).unstack()[list(RATES)]


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """The best rate by mean accuracy, that accuracy, and the range of rates near a seed's best."""
    accuracies = rows.pivot(index="seed", columns=["optimizer", "lr"], values="accuracy")
    lines = []
    for name, decades in widths(rows).items():
        of = accuracies[name]
        best = of.mean().idxmax()
        lines.append(
            {
                "optimizer": name,
                "best learning rate": f"{best:g}",
                "accuracy there": f"{mean_interval(of[best]):.2%}",
                "decades within 1%": f"{mean_interval(decades):.2f}",
            }
        )
    return pd.DataFrame(lines)


def judge(rows: pd.DataFrame, quick: bool) -> list[Verdict]:
    decades = widths(rows)
    ours = decades["RAdam"]
    verdicts = []
    for other in ("Adam", "SGD with momentum", "Adam with warmup"):
        difference = mean_interval(ours - decades[other])
        p = stats.wilcoxon(ours, decades[other]).pvalue
        verdicts.append(
            Verdict(
                difference.is_positive(),
                f"RAdam is within {NEAR:.0%} of its best accuracy over {ours.mean():.2f} "
                f"decades of learning rates, {other} over {decades[other].mean():.2f}: "
                f"{difference:+.2f} (95%, {len(ours)} seeds; Wilcoxon p = {p:.2g})",
            )
        )
    return verdicts


def draw(rows: pd.DataFrame) -> Figure:
    figure, (left, right) = plots.panels(2, width_ratios=(1.8, 1))
    accuracies = rows.pivot(index="seed", columns=["optimizer", "lr"], values="accuracy")
    for name in RATES:
        of = accuracies[name]
        x = of.columns / (100 if name == "SGD with momentum" else 1)
        color = plots.COLORS[name]
        plots.band(left, x, mean_interval(of), color=color, label=name, marker=".")
    best = accuracies.mean().max()
    left.set_title(f"Mean and 95% band of {rows['seed'].nunique()} seeds")
    left.set(xscale="log", xlabel="learning rate (SGD with momentum: 100 times that)")
    left.set(ylim=(best - 0.15, 1), ylabel="accuracy on held-out digits")
    left.legend(loc="lower center")
    decades = widths(rows)
    plots.seeds_and_means(right, decades)
    right.set_yticks(range(len(RATES)), [name.replace(" with ", "\nwith ") for name in RATES])
    right.set(xlabel="decades of learning rates", title="Within 1% of the best")
    return figure
