"""Three pictures of a report: bandwidth by size, models, small tensors."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from .cases import model
from .models import MODELS
from .optimizers import NARROW, OPTIMIZERS
from .results import frame
from .roofline import COPY, STREAM, limit_name
from .tables import machine, times

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STYLES = {row.name: row.style for row in OPTIMIZERS if row.form not in NARROW}
STYLES |= {limit_name(28, kind): "C7--" for kind in (STREAM, COPY)}
LABELS = {"gb_s": "GB/s of bytes that must move", "ms": "time of a step (ms)"}


def bandwidth(table: pd.DataFrame, axes: "Axes") -> None:
    _curves(table[(table.tensors == 1) & (table.elements > 64)], axes, "elements", "gb_s")


def tensors(table: pd.DataFrame, axes: "Axes") -> None:
    _curves(table[table.elements == 64 * table.tensors], axes, "tensors", "ms")


def models(table: pd.DataFrame, axes: "Axes") -> None:
    names = {model(name): name for name in MODELS}
    by_case = table[table.case.isin(names)].pivot_table("ms", "case", "optimizer")
    shown = [row for row in OPTIMIZERS if row.level < 2 and row.name in by_case and not row.form]
    if not shown:
        return
    ratios = by_case[[row.name for row in shown]].div(by_case[shown[0].name], axis="index")
    colors = [row.style.rstrip("-:")[:-1] for row in shown]
    ratios = ratios.reindex([case for case in names if case in ratios.index]).rename(index=names)
    ratios.plot.bar(ax=axes, color=colors, width=0.84, rot=0, xlabel="")
    for bars in axes.containers:
        axes.bar_label(bars, fmt=times, padding=2, fontsize=6)


def _curves(table: pd.DataFrame, axes: "Axes", x: str, y: str) -> None:
    for name, line in STYLES.items():
        points = table[table.optimizer == name].sort_values(x)
        if len(points):
            axes.loglog(points[x], points[y], line, ms=5, label=name)
            axes.set(xlabel=x, ylabel=LABELS[y])


PICTURES = {
    "bandwidth": ("One float32 tensor: bandwidth of a step", bandwidth),
    "models": ("Models in float32: time of a step against ours", models),
    "tensors": ("Many small tensors: time of a step", tensors),
}


def draw(results: dict[str, Any], folder: Path) -> Iterator[Path]:
    """The pictures that there are points for."""
    from matplotlib import style
    from matplotlib.figure import Figure

    table = frame(results).dropna(subset="ms")
    held = (table.kind == "step") & (table.gradients == "held") & (table.dtype == "float32")
    for name, (title, paint) in PICTURES.items():
        with style.context("tableau-colorblind10"):  # colors that color-blind readers tell apart
            figure = Figure(figsize=(8.5, 4.2), dpi=200, layout="constrained")
            axes = figure.subplots()
            paint(table[held], axes)
        file = folder / f"{name}.png"
        if not axes.has_data():
            file.unlink(missing_ok=True)
            continue
        axes.set_title(title)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
        figure.supxlabel(machine(results), fontsize=6, color="#555555")
        figure.savefig(file)
        yield file
