"""One look for all figures: size, colours, bands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

WIDTH = 8.5  # inches, at 200 dots each: twice the width at which a README shows a picture
DPI = 200

# Okabe and Ito's colours, which stay apart for colour-blind readers.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILION, PURPLE = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"
CYCLE = (BLUE, ORANGE, GREEN, PURPLE, VERMILION, SKY, BLACK)
# An optimizer has its colour in every figure.
OPTIMIZERS = {
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
    """A figure of the README's width and its axes, row by row; `height` is in inches, of a row."""
    figure = Figure(
        figsize=(WIDTH, height * rows), dpi=DPI, facecolor="white", layout="constrained"
    )
    grid = figure.subplots(rows, columns, squeeze=False, **options)
    axes = list(grid.flat)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
    return figure, axes


def band(
    ax: Axes,
    x: Sequence[float],
    middle: Sequence[float],
    half: Sequence[float],
    *,
    color: str,
    label: str | None = None,
    **options: Any,
) -> None:
    """A curve and the band of `middle` - `half` to `middle` + `half` around it."""
    middle, half = np.asarray(middle), np.asarray(half)
    ax.plot(x, middle, color=color, label=label, **{"lw": 1.6, **options})
    ax.fill_between(x, middle - half, middle + half, color=color, alpha=0.25, lw=0)


def legend(ax: Axes, **options: Any) -> None:
    """A legend without a frame, in letters that fit beside curves."""
    ax.legend(frameon=False, **{"fontsize": 8.5, **options})
