"""The style of all figures, and the plots that several experiments draw."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from .statistics import mean_interval

WIDTH = 8.5  # inches
STYLE = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "figure.dpi": 200,
    "grid.alpha": 0.25,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
}
# Okabe and Ito's colours, which colour-blind readers can tell apart.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILION, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#777777"
CYCLE = (BLUE, ORANGE, GREEN, PURPLE, VERMILION, SKY, BLACK)
COLORS = {  # of optimizers, in every figure
    "RAdam": ORANGE,
    "Adam": BLUE,
    "Adam with warmup": GREEN,
    "Adam-2k": PURPLE,
    "Adam-eps": SKY,
    "SGD with momentum": BLACK,
}


def panels(
    columns: int = 1, rows: int = 1, *, height: float = 3.4, **options: Any
) -> tuple[Figure, list[Axes]]:
    """A figure and its axes, row by row; `height` is that of a row, in inches."""
    figure = Figure(figsize=(WIDTH, height * rows))
    return figure, list(figure.subplots(rows, columns, squeeze=False, **options).flat)


def band(
    ax: Axes, x: ArrayLike, interval: tuple[ArrayLike, ArrayLike], *, color: str, **options: Any
) -> None:
    """A curve of means, and a band of the given half-widths around it."""
    middle, half = map(np.asarray, interval)
    ax.plot(x, middle, color=color, **{"lw": 1.6, **options})
    ax.fill_between(x, middle - half, middle + half, color=color, alpha=0.25, lw=0)


def seeds_and_means(ax: Axes, samples: pd.DataFrame) -> None:
    """Samples (seeds by optimizers) as dots, with the interval of each optimizer's mean below."""
    mean, half = mean_interval(samples)
    for place, name in enumerate(samples):
        color = COLORS[name.partition(",")[0]]
        ax.plot(samples[name], [place + 0.25] * len(samples), ".", color=color, alpha=0.4)
        ax.errorbar(mean[place], place, xerr=half[place], fmt="o", color=color, capsize=4)
    ax.set_yticks(range(len(samples.columns)), samples.columns)
    ax.invert_yaxis()
